"""The same sums on one, two and three processes and with any batch, in float32."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

import scoring
from runs import in_ranks


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_processes_and_batches_change_no_sum(tmp_path):
    expected = scoring.sums(0, 1)["8 1"]
    every = [scoring.sums(0, 1)]
    for world_size in (2, 3):
        assert in_ranks(world_size, scoring.score, tmp_path) == [0] * world_size
        every += [torch.load(path) for path in sorted(tmp_path.glob(f"{world_size}.*.pt"))]

    assert len(every) == 6
    for found in every:
        for key, (nats, mapped, num_tokens, num_bytes) in found.items():
            # Chunks have less context, so other nats, but they agree with each other as well.
            reference = expected[0] if key.startswith("8 ") else every[0]["32 1"][0]
            assert nats == pytest.approx(reference, rel=1e-9), key
            assert mapped == pytest.approx(reference, rel=1e-9), key
            assert [num_tokens, num_bytes] == expected[2:]
