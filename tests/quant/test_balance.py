"""Balanced steps: what they follow, and that they lose less of the loss at the same size."""

import math

import pytest
import torch

from pgl.artifact.fit import code_bytes, fit_to_limit
from pgl.model import GPT, GPTConfig
from pgl.quant import (
    Calibration,
    GPTQConfig,
    QuantConfig,
    StateQuantizer,
    TensorRule,
    collect_hessians,
    collect_output_energies,
)
from pgl.quant.balance import (
    MAX_OCTAVES_FROM_MEAN,
    REFERENCE_STEP,
    STEPS_PER_OCTAVE,
    balanced_steps,
)
from pgl.quant.gptq import factorise

NAMES = ("blocks.0.mlp.fc.weight", "blocks.0.mlp.proj.weight")


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 24, generator=generator)
    weights = {name: torch.randn(32, 24, generator=generator) for name in NAMES}
    energies = {name: torch.rand(32, generator=generator).pow(4) for name in NAMES}
    return weights, Calibration(dict.fromkeys(NAMES, x.T @ x / 300), energies)


def plan(steps):
    rule = TensorRule(method="gptq")
    return QuantConfig(mlp=rule, passthrough_max_numel=0, gptq=GPTQConfig(steps=steps))


def cost(weights, stored, calibration):
    """Loss to second order: the output errors weighted with what each output is worth."""
    total = 0.0
    for name, weight in weights.items():
        error = weight - stored[name].weights()
        per_row = (error @ calibration.hessians[name] * error).sum(1)
        total += float(per_row @ calibration.energies[name]) / 2
    return total


def test_less_is_lost_at_the_same_size():
    weights, calibration = problem()
    balanced = StateQuantizer(weights, plan("balanced"), calibration)(16.0)
    equal = StateQuantizer(weights, plan("grid"), calibration)
    size = code_bytes(balanced)
    factor = next(f for f in range(10, 400) if code_bytes(equal(f / 10)) < size) / 10
    lost, lost_by_equal = (cost(weights, s, calibration) for s in (balanced, equal(factor)))
    assert lost < 0.7 * lost_by_equal


def test_steps_follow_the_energies_within_and_between_matrices():
    weights, calibration = problem()
    calibration.energies[NAMES[1]].mul_(16)
    stored = StateQuantizer(weights, plan("balanced"), calibration)(16.0)
    steps = torch.stack([stored[name].scale_R.float().log2() for name in NAMES])
    energies = torch.stack([calibration.energies[name] for name in NAMES])
    floor = 1e-3 * energies.mean(1, keepdim=True)
    assert torch.allclose(steps.mean(), torch.tensor(math.log2(16 * REFERENCE_STEP)), atol=0.1)
    relative = steps + (energies + floor).log2() / 2
    assert relative.max() - relative.min() <= 1.01 / STEPS_PER_OCTAVE


def test_inputs_that_matter_more_get_finer_steps():
    hessians = torch.stack([torch.eye(8), 4 * torch.eye(8)])
    steps = balanced_steps(factorise(hessians, GPTQConfig()), torch.ones(2, 5))
    torch.testing.assert_close(steps[0] - steps[1], torch.ones(5))


def test_rows_that_never_mattered_and_zero_matrices_are_coded():
    weights, calibration = problem()
    calibration.energies[NAMES[0]].zero_()
    weights[NAMES[1]].zero_()
    stored = StateQuantizer(weights, plan("balanced"), calibration)()
    assert all(tensor.weights().isfinite().all() for tensor in stored.values())


def test_a_matrix_without_energy_leaves_the_steps_of_the_others_alone():
    weights, calibration = problem()
    alone = {NAMES[1]: weights[NAMES[1]]}
    expected = StateQuantizer(alone, plan("balanced"), calibration)()[NAMES[1]]
    calibration.energies[NAMES[0]].zero_()
    stored = StateQuantizer(weights, plan("balanced"), calibration)()
    assert torch.equal(stored[NAMES[1]].scale_R, expected.scale_R)
    assert torch.equal(stored[NAMES[1]].data, expected.data)
    dead = stored[NAMES[0]].scale_R.float().log2()
    most = math.log2(REFERENCE_STEP) + MAX_OCTAVES_FROM_MEAN
    assert (dead - most).abs().max() <= 1 / STEPS_PER_OCTAVE


def test_a_model_with_a_matrix_without_energy_fits_any_limit():
    weights, calibration = problem()
    calibration.energies[NAMES[0]].zero_()
    quantizer = StateQuantizer(weights, plan("balanced"), calibration)
    for limit_bytes in (50, 400, 900):
        fit = fit_to_limit(quantizer, lambda s: int(code_bytes(s)), limit_bytes, refine=True)
        assert fit.attempts[fit.chosen].total_bytes <= limit_bytes
        assert code_bytes(fit.stored) > 0


def test_weights_beyond_all_steps_are_called_diverged():
    weights, calibration = problem()
    weights[NAMES[0]][3] = 1e8
    with pytest.raises(ValueError, match="the weights have diverged"):
        StateQuantizer(weights, plan("balanced"), calibration)()


def test_energies_are_required():
    weights, calibration = problem()
    with pytest.raises(ValueError, match=r"fc\.weight .* no output energies"):
        StateQuantizer(weights, plan("balanced"), Calibration(calibration.hessians))
    assert plan("balanced").needs_energies()
    assert not plan("grid").needs_energies()


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=32, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1)
    gpt = GPT(config)
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return gpt


def test_energies_are_squared_gradients_of_each_token_of_outputs(gpt):
    ids, targets = torch.randint(32, (4, 8)), torch.randint(32, (4, 8))
    batches = [(ids[:3], targets[:3]), (ids[3:], targets[3:])]
    energies = collect_output_energies(gpt, batches, "cpu", gpt.token_losses)
    hessians = collect_hessians(gpt, [ids], "cpu", forward=gpt.features)
    assert set(hessians) == set(energies)
    assert all(p.grad is None for p in gpt.parameters())
    assert gpt.training
    assert not any(module._forward_hooks for module in gpt.modules())
    # The gradient of a bias that does nothing, before the layer's gain, is the output's.
    name = "blocks.1.mlp.proj"
    layer = gpt.get_submodule(name)
    shift = torch.zeros(4, 8, 16, requires_grad=True)
    handle = layer.register_forward_hook(lambda module, args, output: output + args[1] * shift)
    gpt.eval().token_losses(ids, targets).sum().backward()
    handle.remove()
    expected = shift.grad.square().mean((0, 1))
    torch.testing.assert_close(energies[f"{name}.weight"], expected)


def test_energies_predict_what_an_error_costs(gpt):
    gpt.eval()
    ids = torch.randint(32, (64, 16))
    with torch.no_grad():  # targets from the model itself: then the gradients are Fisher's
        targets = torch.distributions.Categorical(logits=gpt(ids)).sample()
        before = gpt(ids).log_softmax(-1)
    name = "blocks.1.mlp.proj"
    energies = collect_output_energies(gpt, [(ids, targets)], "cpu", gpt.token_losses)
    noise = 0.02 * torch.randn(64, 16, 16)
    handle = gpt.get_submodule(name).register_forward_hook(
        lambda module, args, output: output + args[1] * noise
    )
    with torch.no_grad():
        after = gpt(ids).log_softmax(-1)
    handle.remove()
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    predicted = 0.02**2 * energies[f"{name}.weight"].sum().item() / 2
    assert divergence == pytest.approx(predicted, rel=0.35)


def test_energies_are_of_the_stored_weight_whatever_gain_it_is_under(gpt):
    ids, targets = torch.randint(32, (4, 8)), torch.randint(32, (4, 8))
    before = collect_output_energies(gpt, [(ids, targets)], "cpu", gpt.token_losses)
    block = gpt.blocks[0]
    for gain, layer in ((block.attn_scale, block.attn.proj), (block.mlp_scale, block.mlp.proj)):
        gain.data *= 3
        layer.weight.data /= 3
    after = collect_output_energies(gpt, [(ids, targets)], "cpu", gpt.token_losses)
    for name in before:
        gained = name in ("blocks.0.attn.proj.weight", "blocks.0.mlp.proj.weight")
        torch.testing.assert_close(after[name], (9 if gained else 1) * before[name])


def test_no_batches_are_refused(gpt):
    with pytest.raises(ValueError, match="no calibration batches"):
        collect_output_energies(gpt, [], "cpu", gpt.token_losses)
