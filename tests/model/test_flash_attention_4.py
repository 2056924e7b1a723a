"""The operator around FlashAttention-4: with a stand-in for its package, and on a GPU with it."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from pgl.model import flash_attention_4
from pgl.model.attention import attend

SEQUENCES, LENGTH, HEADS, KEY_HEADS, DIM = 2, 8, 4, 2, 8


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class StandIn(ModuleType):
    """The two functions of the package that the operator calls, with their signatures' use."""

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
        sums = torch.zeros(q.size(0), q.size(2), q.size(1))
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


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    for name in names:
        monkeypatch.setitem(sys.modules, name, StandIn(name))


def tensors(dtype: torch.dtype, device: str = "cpu", length: int = LENGTH, dim: int = DIM) -> list:
    torch.manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    shapes = [(SEQUENCES, length, count, dim) for count in heads]
    return [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.usefixtures("package")
def test_the_operator_is_well_formed() -> None:
    q, k, v = (x.detach() for x in tensors(torch.float32))
    torch.library.opcheck(flash_attention_4.flash_attention_4, (q, k, v))


@pytest.fixture(params=[False, True])
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("package", "deterministic")
def test_attention_goes_through_it_with_gradients_also_when_compiled() -> None:
    inputs = tensors(torch.bfloat16)
    upstream = torch.randn_like(inputs[0])
    expected = torch.autograd.grad(reference(*inputs), inputs, upstream)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return attend(*inputs, backend="fa4")

    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        y_BTHD = function(*inputs)
        assert torch.equal(y_BTHD, reference(*inputs))
        for ours, theirs in zip(
            torch.autograd.grad(y_BTHD, inputs, upstream), expected, strict=True
        ):
            assert relative(ours, theirs.float()) < 1e-2


@pytest.mark.usefixtures("package")
def test_the_last_positions_are_read_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach() for x in tensors(torch.bfloat16))
    expected = attend(q, k, v, backend="fa4")[:, -2:]
    monkeypatch.setattr(StandIn, "_flash_attn_fwd", None)
    torch.testing.assert_close(attend(q[:, -2:], k, v, backend="fa4"), expected)


@pytest.mark.gpu
def test_on_a_gpu_it_is_causal_attention() -> None:
    pytest.importorskip("flash_attn.cute", reason="FlashAttention-4: pip install flash-attn-4")
    inputs = tensors(torch.bfloat16, "cuda", length=256, dim=64)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    y_BTHD, expected_BTHD = attend(*inputs, backend="fa4"), reference(*exact)
    upstream = torch.randn_like(y_BTHD)
    assert relative(y_BTHD, expected_BTHD) < 1e-2
    ours = torch.autograd.grad(y_BTHD, inputs, upstream)
    theirs = torch.autograd.grad(expected_BTHD, exact, upstream.float())
    for gradient, wanted in zip(ours, theirs, strict=True):
        assert relative(gradient, wanted) < 2e-2


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs).detach().norm() / theirs.detach().norm())
