"""Attention, XSA and the document mask against loops that are too slow but obvious."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgl.model.attention import HeadGate, attend, document_mask, exclusive_attention


def slow_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query at a time."""
    batch, length, heads, dim = q.shape
    group = heads // k.size(2)
    y = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                visible = [s for s in range(length) if mask[b, t, s]]
                scores = torch.stack([q[b, t, h] @ k[b, s, h // group] for s in visible])
                weights = (scores / math.sqrt(dim)).softmax(0)
                y[b, t, h] = sum(
                    w * v[b, s, h // group] for w, s in zip(weights, visible, strict=True)
                )
    return y


def qkv(batch: int, length: int, kv_heads: int, group: int, dim: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    heads = (kv_heads * group, kv_heads, kv_heads)
    return tuple(torch.randn(batch, length, h, dim, generator=generator) for h in heads)


@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 7),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([4, 8]),
)
@settings(max_examples=15, deadline=None)
def test_attend(batch: int, length: int, kv_heads: int, group: int, dim: int) -> None:
    q, k, v = qkv(batch, length, kv_heads, group, dim)
    causal = torch.ones(batch, length, length).tril().bool()
    expected = slow_attend(q, k, v, causal)
    for backend in ("auto", "math", "flash"):
        torch.testing.assert_close(attend(q, k, v, backend=backend), expected, atol=1e-5, rtol=1e-4)
    masked = attend(q, k, v, causal.unsqueeze(1))
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-4)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_document_mask(rows: list[list[bool]]) -> None:
    starts = torch.tensor(rows)
    mask = document_mask(starts).squeeze(1)
    for b, row in enumerate(rows):
        for t in range(6):
            for s in range(6):
                same_document = not any(row[s + 1 : t + 1])
                assert mask[b, t, s] == (s <= t and same_document)


def test_attend_within_documents() -> None:
    q, k, v = qkv(2, 6, 2, 2, 4)
    starts = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1]]).bool()
    mask = document_mask(starts)
    expected = slow_attend(q, k, v, mask.squeeze(1))
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-5, rtol=1e-4)


def test_exclusive_attention_leaves_nothing_along_the_own_value() -> None:
    y, _, v = qkv(2, 5, 2, 3, 8)
    out = exclusive_attention(y, v)
    for h in range(6):
        value = v[:, :, h // 3]
        unit = value / value.norm(dim=-1, keepdim=True)
        removed = (y[:, :, h] * unit).sum(-1, keepdim=True) * unit
        torch.testing.assert_close(out[:, :, h], y[:, :, h] - removed, atol=1e-6, rtol=1e-5)
    zero_value = torch.zeros_like(v)
    assert torch.equal(exclusive_attention(y, zero_value), y)


def test_head_gate_starts_nearly_open() -> None:
    gate = HeadGate(model_dim=6, num_heads=3)(torch.randn(2, 5, 6))
    assert gate.shape == (2, 5, 3, 1)
    torch.testing.assert_close(gate, torch.full_like(gate, 1 / (1 + math.exp(-4.0))))
