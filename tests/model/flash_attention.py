"""A stand-in for the package flash-attn-4 on CPUs: what the operator calls, computed plainly."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return torch's causal attention of grouped heads, (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class StandIn(ModuleType):
    """The package's two functions, with the arguments that the operator gives them."""

    backward_groups: list[int]
    """Query heads to a key head in each call of the backward pass."""

    def _flash_attn_fwd(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        return_lse: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        assert causal
        assert return_lse
        sums = torch.zeros(q.size(0), q.size(2), q.size(1), dtype=torch.float32)
        return reference(q, k, v).contiguous(), sums, None, None, None

    def _flash_attn_bwd(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        dout: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        deterministic: bool,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
    ) -> None:
        self.backward_groups.append(q.size(2) // k.size(2))
        assert causal
        assert deterministic is torch.are_deterministic_algorithms_enabled()
        assert lse.shape == (q.size(0), q.size(2), q.size(1))
        for place, gradient in zip((dq, dk, dv), gradients(q, k, v, dout), strict=True):
            place.copy_(gradient)


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    # By hand: inside of an operator torch records nothing.
    group = q.size(2) // k.size(2)
    q, dy = q.float(), dy.float()
    k, v = (x.float().repeat_interleave(group, dim=2) for x in (k, v))
    scale = q.size(-1) ** -0.5
    future = torch.ones(q.size(1), q.size(1), dtype=torch.bool).triu(1)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    dp = torch.einsum("bthd,bshd->bhts", dy, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dk = torch.einsum("bhts,bthd->bshd", ds, q).unflatten(2, (-1, group)).sum(3)
    dv = torch.einsum("bhts,bthd->bshd", p, dy).unflatten(2, (-1, group)).sum(3)
    return torch.einsum("bhts,bshd->bthd", ds, k), dk, dv


def install(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Let the package be found, for this test, and return its interface."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        stand_in = StandIn(name)
        stand_in.backward_groups = []
        monkeypatch.setitem(sys.modules, name, stand_in)
    return stand_in
