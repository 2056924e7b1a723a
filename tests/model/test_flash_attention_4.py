"""The operator around FlashAttention-4: with a stand-in for its package, and on a GPU with it."""

from collections.abc import Iterator

import pytest
import torch

from pgl.model import flash_attention_4
from pgl.model.attention import attend
from tests.model.flash_attention import StandIn, install, reference

SEQUENCES, LENGTH, HEADS, KEY_HEADS, DIM = 2, 8, 4, 2, 8


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def tensors(dtype: torch.dtype, device: str = "cpu", length: int = LENGTH, dim: int = DIM) -> list:
    torch.manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    shapes = [(SEQUENCES, length, count, dim) for count in heads]
    return [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.usefixtures("package")
def test_the_operators_are_well_formed() -> None:
    inputs = [x.detach() for x in tensors(torch.float32)]
    torch.library.opcheck(flash_attention_4.flash_attention_4_forward, inputs)
    output = flash_attention_4.flash_attention_4_forward(*inputs)
    backward = flash_attention_4.flash_attention_4_backward
    for copies in (1, HEADS // KEY_HEADS):
        torch.library.opcheck(backward, (torch.ones_like(inputs[0]), *inputs, *output, copies))


@pytest.mark.usefixtures("package")
def test_copies_of_keys_and_values_get_gradients_of_their_own() -> None:
    q, k, v = tensors(torch.float32)
    copies = [x.unsqueeze(3).expand(-1, -1, -1, HEADS // KEY_HEADS, -1) for x in (k, v)]
    y_BTHD = flash_attention_4.flash_attention_4(q, *copies)
    upstream = torch.randn_like(y_BTHD)
    of_copies = torch.autograd.grad(y_BTHD, copies, upstream, retain_graph=True)
    expected = torch.autograd.grad(reference(q, k, v), (k, v), upstream)
    for ours, theirs in zip(of_copies, expected, strict=True):
        assert relative(ours[:, :, :, 0], theirs) > 0.1
        torch.testing.assert_close(ours.sum(3), theirs)


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
@pytest.mark.parametrize("copies", [1, 2])
def test_on_a_gpu_it_is_causal_attention(copies: int) -> None:
    pytest.importorskip("flash_attn.cute", reason="FlashAttention-4: pip install flash-attn-4")
    inputs = tensors(torch.bfloat16, "cuda", length=256, dim=64)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    q, k, v = inputs
    if copies > 1:
        k = k.unsqueeze(3).expand(-1, -1, -1, copies, -1)  # and as many of the values
    y_BTHD, expected_BTHD = attend(q, k, v, backend="fa4"), reference(*exact)
    upstream = torch.randn_like(y_BTHD)
    assert relative(y_BTHD, expected_BTHD) < 1e-2
    ours = torch.autograd.grad(y_BTHD, inputs, upstream)
    theirs = torch.autograd.grad(expected_BTHD, exact, upstream.float())
    for gradient, wanted in zip(ours, theirs, strict=True):
        assert relative(gradient, wanted) < 2e-2


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs).detach().norm() / theirs.detach().norm())
