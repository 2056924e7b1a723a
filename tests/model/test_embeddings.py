"""Bigram hash and smear gate against loops, with and without document starts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.model import GPT
from pgl.model.embeddings import SmearGate, bigram_bucket, document_starts
from tests.parity.recipes import shallow

rows = st.lists(st.integers(0, 65535), min_size=1, max_size=9)


@given(ids=rows, num_buckets=st.integers(2, 5000), bos=st.integers(0, 3), reset=st.booleans())
@settings(max_examples=40, deadline=None)
def test_bigram_bucket(ids: list[int], num_buckets: int, bos: int, reset: bool) -> None:
    """Python integers do not overflow: the largest ids of a uint16 shard have to work too."""
    ids = [token % 4 if token % 2 else token for token in ids]
    expected = []
    for t, token in enumerate(ids):
        if t == 0 or (reset and token == bos):
            expected.append(num_buckets - 1)
        else:
            expected.append(((36313 * token) ^ (27191 * ids[t - 1])) % (num_buckets - 1))
    ids_BT = torch.tensor([ids], dtype=torch.int32)
    starts_BT = document_starts(ids_BT, bos) if reset else None
    assert bigram_bucket(ids_BT, num_buckets, starts_BT).tolist() == [expected]


@given(starts=st.lists(st.booleans(), min_size=1, max_size=8), reset=st.booleans())
@settings(max_examples=20, deadline=None)
def test_smear_gate(starts: list[bool], reset: bool) -> None:
    x = torch.randn(1, len(starts), 3, generator=torch.Generator().manual_seed(0))
    smear = SmearGate(3)
    smear.gate.data.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    g = smear.gate.sigmoid()
    out = smear(x, torch.tensor([starts]) if reset else None)
    for t, start in enumerate(starts):
        previous = torch.zeros(3) if t == 0 or (reset and start) else x[0, t - 1]
        torch.testing.assert_close(out[0, t], (1 - g) * x[0, t] + g * previous)


def test_smear_document_reset_keeps_documents_apart_in_the_embedding() -> None:
    ids = torch.tensor([[5, 6, 7, 1, 8, 9]])
    changed = torch.tensor([[5, 6, 9, 1, 8, 9]])
    for reset in (False, True):
        gpt = GPT(shallow("236", smear_document_reset=reset, bigram_buckets=0))
        x, y = (gpt._embed(i, document_starts(i, gpt.config.bos_id)) for i in (ids, changed))
        assert torch.equal(x[:, 3:], y[:, 3:]) == reset
