"""The whole model against the reference models: logits, losses and every gradient."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgl.model import GPT
from tests.parity.recipes import PRS, golden_model, golden_tensors

Golden = Callable[[str], dict[str, np.ndarray]]

LOGITS_ATOL = 5e-5
LOSS_ATOL = 1e-5
GRADIENT_RELATIVE_L2 = 1e-4


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_logits_close(actual: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=LOGITS_ATOL, rtol=0)


def assert_gradients_close(gpt: GPT, expected: dict[str, Tensor]) -> None:
    gradients = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    assert gradients.keys() == expected.keys()
    errors = {name: relative_l2(gradients[name], expected[name]) for name in expected}
    assert max(errors.values()) <= GRADIENT_RELATIVE_L2, errors


def inputs(arrays: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["targets"])


def mile_loss(logits_BTV: Tensor, targets_BT: Tensor, gamma: float) -> Tensor:
    """The formula written out: easy tokens (low entropy) count less, never below 0.1."""
    with torch.no_grad():
        p_BTV = logits_BTV.softmax(dim=-1)
        entropy_BT = -(p_BTV * (p_BTV + 1e-8).log()).sum(dim=-1)
        weight_BT = (1 - (-entropy_BT).exp()).pow(gamma).clamp_min(0.1)
    loss_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT.long(), reduction="none")
    return (weight_BT * loss_BT).sum() / weight_BT.sum()


@pytest.mark.parametrize("pr", PRS)
def test_logits_and_losses(golden: Golden, pr: str) -> None:
    arrays = golden(f"model_{pr}")
    gpt = golden_model(pr, arrays)
    ids, targets = inputs(arrays)
    for mode, name in ((True, "loss"), (False, "loss_eval")):
        gpt.train(mode)
        assert_logits_close(gpt(ids), arrays["logits"])
        loss = gpt.token_losses(ids, targets).mean()
        assert abs(loss.item() - float(arrays[name])) <= LOSS_ATOL


@pytest.mark.parametrize("pr", PRS)
def test_gradients(golden: Golden, pr: str) -> None:
    arrays = golden(f"model_{pr}")
    gpt = golden_model(pr, arrays)
    gpt.token_losses(*inputs(arrays)).mean().backward()
    assert_gradients_close(gpt, golden_tensors(arrays, "grad"))


@pytest.mark.parametrize("pr", PRS)
def test_context_beyond_the_rope_train_length(golden: Golden, pr: str) -> None:
    arrays = golden(f"model_{pr}")
    changes = {}
    if "long_rope_train_len" in arrays:
        changes["rope_train_len"] = int(arrays["long_rope_train_len"])
    gpt = golden_model(pr, arrays, **changes).eval()
    ids, targets = (torch.from_numpy(arrays[name]) for name in ("long_ids", "long_targets"))
    assert ids.size(1) > gpt.config.rope_train_len
    with torch.no_grad():
        positions = torch.from_numpy(arrays["long_positions"])
        assert_logits_close(gpt(ids)[0, positions], arrays["long_logits_at_positions"])
        loss = gpt.token_losses(ids, targets).mean().item()
    assert abs(loss - float(arrays["long_loss"])) <= LOSS_ATOL


def test_quantisation_aware_training_of_324(golden: Golden) -> None:
    arrays = golden("model_324")
    gpt = golden_model("324", arrays).train()
    for block in gpt.blocks:
        for linear in (block.mlp.fc, block.mlp.proj):
            linear.qat_clip = 15
        for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.attn.proj):
            linear.qat_clip = 31
    gpt.bigram.proj.qat_clip = 31
    ids, targets = inputs(arrays)
    assert_logits_close(gpt(ids), arrays["logits_qat"])
    loss = gpt.token_losses(ids, targets).mean()
    assert abs(loss.item() - float(arrays["loss_qat"])) <= LOSS_ATOL
    loss.backward()
    assert_gradients_close(gpt, golden_tensors(arrays, "grad_qat"))
    assert_logits_close(gpt.eval()(ids), arrays["logits"])


def test_mile_loss_of_703(golden: Golden) -> None:
    arrays = golden("model_703")
    gpt = golden_model("703", arrays)
    ids, targets = inputs(arrays)
    loss = mile_loss(gpt(ids), targets, float(arrays["mile_gamma"]))
    assert abs(loss.item() - float(arrays["loss_mile1p1"])) <= LOSS_ATOL
    loss.backward()
    assert_gradients_close(gpt, golden_tensors(arrays, "grad_mile1p1"))
