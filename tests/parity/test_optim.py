"""Newton-Schulz, Muon steps, int8 momentum and routing against the reference runs' numbers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pgl.optim import (
    MuonAdamW,
    OptimizerConfig,
    dequantize_blocks,
    quantize_blocks,
    route,
    zeropower,
)
from pgl.optim.muon import apply_update_, momentum_direction, shape_scale

Golden = Callable[[str], dict[str, np.ndarray]]

MATRIX_CASES = ("square", "tall", "wide")
BANK_CASES = ("bank_square", "bank_tall", "bank_wide")


def tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(np.array(array)).to(dtype)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_newton_schulz_in_double_precision(golden: Golden) -> None:
    arrays = golden("newton_schulz")
    names = [name.removeprefix("ns5_f64_") for name in arrays if name.startswith("ns5_f64_")]
    assert names
    for name in names:
        ours = zeropower(tensor(arrays[f"G_{name}"], torch.float64), dtype=torch.float64)
        torch.testing.assert_close(
            ours, tensor(arrays[f"ns5_f64_{name}"], torch.float64), atol=1e-6, rtol=1e-6, msg=name
        )


def test_newton_schulz_in_bf16(golden: Golden) -> None:
    arrays = golden("newton_schulz")
    references = [name for name in arrays if name.startswith("ns5_bf16_")]
    for reference in references:
        case = reference.removeprefix("ns5_bf16_").removeprefix("batched_form_")
        if case == "lowrank":  # its small singular values are bf16 noise in every implementation
            continue
        ours = zeropower(tensor(arrays[f"G_{case}"]))
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, tensor(arrays[reference])) < 0.06, reference


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 0.06), (2, 0.06), (3, 0.06), (10, 0.15)])
def test_newton_schulz_step_counts(golden: Golden, steps: int, tolerance: float) -> None:
    arrays = golden("newton_schulz")
    G = tensor(arrays["G_square"])
    exact = zeropower(G.double(), steps, dtype=torch.float64)
    torch.testing.assert_close(
        exact, tensor(arrays[f"ns{steps}_f64_square"], torch.float64), atol=1e-6, rtol=1e-6
    )
    # bf16 noise grows with the steps; ours is about half that of the reference.
    ours, theirs = zeropower(G, steps), tensor(arrays[f"ns{steps}_bf16_square"])
    assert relative_error(ours, theirs) < tolerance
    assert relative_error(ours, exact) < relative_error(theirs, exact) + 0.01


def test_zero_matrix_in_a_batch_stays_exactly_zero(golden: Golden) -> None:
    arrays = golden("newton_schulz")
    for name in arrays:
        if name.startswith("G_batched"):
            assert not zeropower(tensor(arrays[name]))[-1].any()


@pytest.mark.parametrize("case", MATRIX_CASES)
def test_momentum_and_nesterov_direction(golden: Golden, case: str) -> None:
    arrays = golden("muon_steps")
    M = torch.zeros_like(tensor(arrays[f"param0_{case}"])[None])
    for i, mu in enumerate(arrays["momentum"]):
        u = momentum_direction(M, tensor(arrays[f"grad_{case}"][i])[None], float(mu), nesterov=True)
        torch.testing.assert_close(
            M[0], tensor(arrays[f"momentum_buffer_{case}"][i]), rtol=1e-6, atol=1e-7
        )
        torch.testing.assert_close(
            u[0], tensor(arrays[f"nesterov_direction_{case}"][i]), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("case", MATRIX_CASES)
@pytest.mark.parametrize(
    ("order", "name"), [("after", "decay_after_236"), ("before", "decay_before_324")]
)
def test_update_and_decay_order(golden: Golden, case: str, order: str, name: str) -> None:
    arrays = golden("muon_steps")
    p = tensor(arrays[f"param0_{case}"])
    for i, lr in enumerate(arrays["lr"].tolist()):
        # These references multiply the factor in bf16, ours goes into the fp32 step size.
        update = tensor(arrays[f"ns5_output_bf16_{case}"][i], torch.bfloat16) * shape_scale(
            *p.shape
        )
        decay = lr * float(arrays["weight_decay"])
        apply_update_([p], update[None], lr, decay, order)
        torch.testing.assert_close(p, tensor(arrays[f"param_{name}_{case}"][i]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", BANK_CASES)
def test_bank_steps_with_bf16_momentum(golden: Golden, case: str) -> None:
    arrays = golden("muon_steps")
    p = tensor(arrays[f"param0_{case}"])
    M = torch.zeros_like(p, dtype=torch.bfloat16)
    for i, lr in enumerate(arrays["lr"].tolist()):
        mu = float(arrays["momentum"][i])
        u = momentum_direction(M, tensor(arrays[f"grad_{case}"][i]), mu, nesterov=True)
        assert torch.equal(M.float(), tensor(arrays[f"momentum_buffer_bf16_{case}"][i]))
        assert torch.equal(u.float(), tensor(arrays[f"nesterov_direction_703_{case}"][i]))
        update = tensor(arrays[f"ns5_output_bf16_703_{case}"][i])
        scale = shape_scale(*p.shape[1:])
        apply_update_(list(p), update, lr * scale, lr * float(arrays["weight_decay"]), "before")
        torch.testing.assert_close(p, tensor(arrays[f"param_703_{case}"][i]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", BANK_CASES)
def test_bank_steps_with_int8_momentum(golden: Golden, case: str) -> None:
    arrays = golden("muon_steps")
    shape = arrays[f"param0_{case}"].shape
    size = int(np.prod(shape))
    M = torch.zeros(shape, dtype=torch.bfloat16)
    for i, mu in enumerate(arrays["momentum"].tolist()):
        u = momentum_direction(M, tensor(arrays[f"grad_{case}"][i]), mu, nesterov=True)
        assert torch.equal(u.float(), tensor(arrays[f"nesterov_direction_703_int8mom_{case}"][i]))
        codes, scale = quantize_blocks(M.flatten())
        assert torch.equal(codes, tensor(arrays[f"momentum_codes_{case}"][i]))
        assert torch.equal(scale.float(), tensor(arrays[f"momentum_scale_{case}"][i]))
        M = dequantize_blocks(codes, scale, size).view(shape)


def run_optimizer(arrays: dict[str, np.ndarray], case: str, order: str, **options: object) -> list:
    """Take all steps of a case with MuonAdamW itself, and return the matrices after each."""
    start = tensor(arrays[f"param0_{case}"])
    start = start if start.ndim == 3 else start[None]
    parameters = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    group = {
        "kind": "muon",
        "name": "matrix",
        "params": parameters,
        "weight_decay": float(arrays["weight_decay"]),
        "ns_steps": int(arrays["ns_steps"]),
        "decay_order": order,
    }
    optimizer = MuonAdamW([group], **options)
    history = []
    for i, lr in enumerate(arrays["lr"].tolist()):
        optimizer.param_groups[0].update(lr=lr, momentum=float(arrays["momentum"][i]))
        gradient = tensor(arrays[f"grad_{case}"][i]).view_as(start)
        for parameter, grad in zip(parameters, gradient, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        history.append(torch.stack([p.detach().clone() for p in parameters]))
    return history


@pytest.mark.parametrize("case", MATRIX_CASES)
def test_whole_optimizer_with_decay_after(golden: Golden, case: str) -> None:
    arrays = golden("muon_steps")
    exact = tensor(arrays[f"param_f64_decay_after_236_{case}"])
    for ours, theirs in zip(run_optimizer(arrays, case, "after"), exact, strict=True):
        torch.testing.assert_close(ours[0], theirs, rtol=0, atol=4e-3)
    fine = run_optimizer(arrays, case, "after", ns_dtype=torch.float32)
    torch.testing.assert_close(fine[-1][0], exact[-1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", BANK_CASES)
@pytest.mark.parametrize("momentum_format", ["float32", "bfloat16", "int8"])
def test_whole_optimizer_with_decay_before(golden: Golden, case: str, momentum_format: str) -> None:
    arrays = golden("muon_steps")
    exact = tensor(arrays[f"param_f64_703_{case}"])
    history = run_optimizer(arrays, case, "before", momentum_format=momentum_format)
    for ours, theirs in zip(history, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-3)


def test_int8_blocks(golden: Golden) -> None:
    arrays = golden("int8_blockwise")
    block_size = int(arrays["block_size"])
    cases = [name.removesuffix("_input") for name in arrays if name.endswith("_input")]
    assert cases
    for case in cases:
        dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
        x = tensor(arrays[f"{case}_input"], dtype)
        codes, scale = quantize_blocks(x.flatten(), block_size)
        assert torch.equal(codes, tensor(arrays[f"{case}_codes"])), case
        assert torch.equal(scale.float(), tensor(arrays[f"{case}_scale"])), case
        back = dequantize_blocks(codes, scale, x.numel()).view(x.shape)
        assert torch.equal(back.float(), tensor(arrays[f"{case}_dequant"])), case


ROUTING = {
    "236": OptimizerConfig(bigram_proj="adamw", bigram_embedding_lr="scalar"),
    "324": OptimizerConfig(),
    "388": OptimizerConfig(),
    "703": OptimizerConfig(bigram_proj="adamw", value_embedding_proj="adamw"),
}
GROUP_OF_REFERENCE = {
    "adamw_embedding_lr": "embedding",
    "adamw_scalar_lr": "scalar",
    "muon_matrix_lr": "matrix",
}


@pytest.mark.parametrize("pull_request", ROUTING)
def test_routing(golden: Golden, pull_request: str) -> None:
    arrays = golden(f"init_stats_{pull_request}")
    columns = (arrays["name"].tolist(), arrays["ndim"].tolist(), arrays["optimizer_group"].tolist())
    for name, ndim, group in zip(*columns, strict=True):
        if name.endswith("_bank"):  # here these are the per-layer matrices of PR #388
            assert group == "muon_matrix_lr"
            continue
        assert route(name, ndim, ROUTING[pull_request]) == GROUP_OF_REFERENCE[group], name


def test_routing_of_unbanked_names(golden: Golden) -> None:
    names = golden("init_stats_703")["storage_name"].tolist()
    matrices = [n for n in names if n.startswith("blocks.") and n.endswith(".weight")]
    assert len(matrices) == 6 * 11
    assert {route(name, 2, ROUTING["703"]) for name in matrices} == {"matrix"}
