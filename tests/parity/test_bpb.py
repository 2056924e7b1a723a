"""Byte tables, bytes per target, loss and bpb against the reference's."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pgl.evaluate import BitsPerByte, ByteTable


@pytest.fixture
def reference(golden):
    return golden("bpb_luts")


@pytest.fixture
def table(reference) -> ByteTable:
    return ByteTable(
        torch.from_numpy(reference["base_bytes"]),
        torch.from_numpy(reference["has_leading_space"]),
        torch.from_numpy(reference["is_boundary"]),
        "golden",
        "",
    )


def test_table_of_the_challenge_tokenizer_is_exact(reference, challenge_tokenizer):
    table = ByteTable.from_tokenizer(challenge_tokenizer, int(reference["vocab_size"]))

    assert table.base_bytes_V.dtype == torch.int16
    np.testing.assert_array_equal(table.base_bytes_V.numpy(), reference["base_bytes"])
    np.testing.assert_array_equal(table.has_leading_space_V.numpy(), reference["has_leading_space"])
    np.testing.assert_array_equal(table.is_boundary_V.numpy(), reference["is_boundary"])
    assert table.tokenizer_sha256.startswith("4f5e8adb")
    assert table.tokenizer_name == "fineweb_1024_bpe.model"


def test_target_bytes_are_exact(reference, table):
    tokens = torch.from_numpy(reference["tokens"].astype(np.int64))

    counted = table.target_bytes(tokens[:, :-1], tokens[:, 1:])

    assert counted.dtype == torch.int16
    np.testing.assert_array_equal(counted.numpy(), reference["target_bytes"])
    pairs = table.target_bytes(
        torch.from_numpy(reference["pair_prev"]), torch.from_numpy(reference["pair_target"])
    )
    np.testing.assert_array_equal(pairs.numpy(), reference["pair_bytes"])


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("batch", [4096, 1000, 1])
def test_loss_and_bpb_are_those_of_the_reference(reference, table, row, batch):
    metric = BitsPerByte(table)
    tokens = torch.from_numpy(reference["tokens"][row].astype(np.int32))
    nats = torch.from_numpy(reference["nats"][row])

    for i in range(0, 4096, batch):
        here, j = slice(i, i + batch), min(i + batch, 4096)
        metric.update(nats[here], tokens[i:j], tokens[i + 1 : j + 1])
    scores = metric.compute()

    assert int(scores["bytes"]) == reference["total_bytes"][row]
    assert int(scores["tokens"]) == 4096
    assert scores["bpb"].dtype == torch.float64
    assert float(scores["loss"]) == pytest.approx(reference["val_loss"][row], rel=1e-12)
    assert float(scores["bpb"]) == pytest.approx(reference["val_bpb"][row], rel=1e-12)
    assert float(scores["bpb"]) == pytest.approx(reference["val_bpb_batched_fp32"][row], rel=5e-7)


@pytest.fixture
def challenge_tokenizer() -> Path:
    here = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
    golden_folder = Path(os.environ.get("PGL_GOLDEN", here))
    default = golden_folder.parent / "data" / "fineweb_1024_bpe.model"
    path = Path(os.environ.get("PGL_TOKENIZER", default))
    if not path.is_file():
        pytest.skip(f"the challenge's tokenizer is not there: {path} (set PGL_TOKENIZER)")
    return path
