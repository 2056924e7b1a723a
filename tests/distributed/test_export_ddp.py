"""A search for the size on two processes: rank 0 decides, and both end with the same artifact."""

import json
import sys
from pathlib import Path

import pytest

from pgl.data import Shards

sys.path.append(str(Path(__file__).parent))

import export_ranks
from runs import in_ranks


@pytest.mark.slow
def test_ranks_whose_floats_differ_search_together(tmp_path, tiny_corpus: Shards):
    source = (str(tiny_corpus.directory), str(tiny_corpus.tokenizer_path))
    assert in_ranks(2, export_ranks.export, tmp_path, source) == [0, 0]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first["attempts"]) > 1
    [artifact] = (tmp_path / "run").glob("*.pgl")
    assert artifact.stat().st_size <= export_ranks.LIMIT_BYTES
    assert artifact.stat().st_size in first["attempts"]
