"""What is float32 and what bfloat16 under bf16-mixed, the same on each torch version.

torch 2.12 put rms_norm on autocast's float32 list; CPU and CUDA have different lists besides. The
model leaves nothing to those lists, and this test writes down the outcome.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pgl.model import GPT
from pgl.model.linear import CastedLinear
from tests.parity.recipes import PRS, randomize, shallow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
F32, BF16 = torch.float32, torch.bfloat16


class DtypeRecorder(TorchFunctionMode):
    """Dtypes of the tensors that go into the functions watched."""

    WATCHED = ("scaled_dot_product_attention", "linear", "tanh", "cross_entropy")

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, set[torch.dtype]] = {name: set() for name in self.WATCHED}

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in self.inputs:
            floats = (a for a in args if isinstance(a, Tensor) and a.is_floating_point())
            self.inputs[name] |= {a.dtype for a in floats}
        return function(*args, **(kwargs or {}))


def outputs_by_module(gpt: GPT) -> dict[str, set[torch.dtype]]:
    """Register hooks that note the dtype of each module's output under its name."""
    dtypes: dict[str, set[torch.dtype]] = {}

    def note(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            dtypes.setdefault(name, set()).update(t.dtype for t in tensors)

        return hook

    for name, module in gpt.named_modules():
        if name:
            module.register_forward_hook(note(name))
    return dtypes


@pytest.mark.parametrize("embedding_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pr", PRS)
def test_bf16_mixed(pr: str, device: str, embedding_dtype: str) -> None:
    config = shallow(pr, value_residual=True, gated_attention=True, embedding_dtype=embedding_dtype)
    gpt = randomize(GPT(config)).to(device)
    dtypes = outputs_by_module(gpt)
    ids = torch.randint(64, (2, 8), device=device)
    with torch.autocast(device, BF16), DtypeRecorder() as recorder:
        features = gpt.features(ids)
        logits = gpt.logits(features)
        losses = gpt.token_losses(ids, ids)
    losses.mean().backward()

    tables = {"tok_emb", "bigram.embed", "ve_shared.embed"}
    for name, dtype in dtypes.items():
        assert dtype == {getattr(torch, embedding_dtype) if name in tables else BF16}, name
    assert recorder.inputs == {
        "scaled_dot_product_attention": {BF16},
        "linear": {BF16},
        "tanh": {F32},
        "cross_entropy": {F32},
    }
    assert (features.dtype, logits.dtype, losses.dtype) == (BF16, F32, F32)
    for name, p in gpt.named_parameters():
        table = name.removesuffix(".weight") in tables
        assert p.dtype == p.grad.dtype == (getattr(torch, embedding_dtype) if table else F32), name


@pytest.mark.parametrize("embedding_dtype", ["float32", "bfloat16"])
def test_without_autocast_all_is_float32(embedding_dtype: str) -> None:
    gpt = randomize(GPT(shallow("703", embedding_dtype=embedding_dtype)))
    with DtypeRecorder() as recorder:
        losses = gpt.token_losses(torch.randint(64, (2, 8)), torch.randint(64, (2, 8)))
    assert losses.dtype == F32
    assert all(dtypes == {F32} for dtypes in recorder.inputs.values())


def test_all_bfloat16_model_keeps_its_loss_in_float32() -> None:
    gpt = randomize(GPT(shallow("703"))).bfloat16()
    ids = torch.randint(64, (2, 8))
    assert gpt.features(ids).dtype == BF16
    assert gpt.token_losses(ids, ids).dtype == F32


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_mixed_stays_near_float32(device: str) -> None:
    gpt = randomize(GPT(shallow("703"))).to(device)
    ids = torch.randint(64, (2, 16), device=device)
    with torch.no_grad():
        exact = gpt.token_losses(ids, ids.roll(-1, 1)).mean().item()
        with torch.autocast(device, BF16):
            mixed = gpt.token_losses(ids, ids.roll(-1, 1)).mean().item()
    assert mixed == pytest.approx(exact, rel=0.02)


def test_fake_quantised_weights_are_in_the_compute_dtype() -> None:
    linear = CastedLinear(8, 4)
    linear.qat_clip = 15
    assert linear(torch.randn(2, 8, dtype=BF16)).dtype == BF16
