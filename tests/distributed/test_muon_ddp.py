"""MuonAdamW in several processes, two ways: replicas bit-identical, the same as one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))

import muon_ranks
from muon_ranks import CLIP_NORM, EXACT, FORMATS, STEPS, Training, batch, run_way, train

REPOSITORY = Path(__file__).resolve().parents[2]
WAYS = ("ddp", "parallel")
WORLD_SIZES = (3, 2)
ROUNDING = 1e-5
COARSE_ROUNDING = 5e-3
"""With bfloat16 iterations or int8 codes, which may round to their other neighbour."""
COARSE_RUNS = (*FORMATS, "exact_int8")


def in_ranks(folder: Path, world_size: int, *half: Path) -> list[dict[str, Any]]:
    """Run :func:`muon_ranks.worker` in so many processes and return their results."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, muon_ranks.__file__]
    processes = [
        subprocess.Popen(
            [*script, str(rank), str(world_size), str(folder), *map(str, half)], env=environment
        )
        for rank in range(world_size)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * world_size
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The results of one process."""
    return run_way("alone")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, alone) -> dict[int, list[dict[str, Any]]]:
    """The results by world size and rank: three go on from one's half, two from that of three."""
    folder = tmp_path_factory.mktemp("ranks")
    half, results = folder / "half.pt", {}
    torch.save(alone["half"], half)
    for world_size in WORLD_SIZES:
        results[world_size] = in_ranks(folder / str(world_size), world_size, half)
        torch.save(results[world_size][0]["parallel"]["half"], half)
    return results


def assert_same(a: object, b: object, path: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{index}")
    else:
        assert a == b, path


def assert_close(ours: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, rtol=0, atol=tolerance)
    assert ours["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    assert list(ours["optimizer"]["state"]) == list(expected["optimizer"]["state"])
    for index, state in expected["optimizer"]["state"].items():
        own = ours["optimizer"]["state"][index]
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()} == shapes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_replicas_are_bit_identical(ranks, world_size, way):
    first = ranks[world_size][0][way]
    for other in ranks[world_size][1:]:
        for run in first.keys() - {"local"}:
            for part in ("weights", "optimizer", "norms"):
                assert_same(other[way][run][part], first[run][part], f"{run}/{part}")
        if way == "parallel":  # norms are each rank's own there
            assert_same(other[way]["local"]["weights"], first["local"]["weights"])
            assert_same(other[way]["local"]["optimizer"], first["local"]["optimizer"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("run", [*FORMATS, "exact", "exact_int8", "unclipped", "accumulated"])
def test_several_processes_are_one(ranks, alone, world_size, way, run):
    ours = ranks[world_size][0][way][run]
    coarse = run in COARSE_RUNS
    assert_close(ours, alone[run], COARSE_ROUNDING if coarse else ROUNDING)
    torch.testing.assert_close(
        ours["norms"], alone[run]["norms"], rtol=2e-2 if coarse else 1e-4, atol=0
    )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_momentum_is_that_of_one_process(ranks, alone, world_size):
    for way in WAYS:
        ours = ranks[world_size][0][way]["exact"]["optimizer"]["state"]
        for index, state in alone["exact"]["optimizer"]["state"].items():
            if "momentum_buffer" in state:
                torch.testing.assert_close(
                    ours[index]["momentum_buffer"], state["momentum_buffer"], rtol=1e-4, atol=1e-6
                )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_momentum_is_spread_over_the_ranks(ranks, alone, world_size):
    whole = alone["float32"]["momentum_bytes"]
    assert whole == 4 * (7 * 64 + 160 + 24)
    # Consecutive matrices, as many as there are places: 7 are 3 + 3 + 1 over three ranks.
    layers = {2: [4, 3], 3: [3, 3, 1]}[world_size]
    for way in WAYS:
        for run, size in (("float32", 4), ("bfloat16", 2)):
            taken = [rank[way][run]["momentum_bytes"] for rank in ranks[world_size]]
            single = [160 + 24] + [0] * (world_size - 1)
            assert taken == [
                size * (64 * count + rest) for count, rest in zip(layers, single, strict=True)
            ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_checkpoints_go_from_any_number_of_processes_to_any_other(ranks, alone, world_size, way):
    """One process to three (either way), three under Parallel Muon to two (either way)."""
    assert_close(ranks[world_size][0][way]["resumed"], alone["exact"], ROUNDING)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_checkpoint_of_several_processes_resumes_in_one(ranks, alone, world_size, way):
    training = Training("alone", **EXACT)
    training.restore(ranks[world_size][0][way]["half"])
    training.norms = list(alone["half"]["norms"])
    training.steps(STEPS // 2, STEPS)
    assert_close(training.result(), alone["exact"], ROUNDING)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_ranks_own_state_undoes_steps_without_collectives(ranks, world_size):
    for way in WAYS:
        for rank in ranks[world_size]:
            undone = rank["undone"][way]
            for part in ("weights", "optimizer", "norms"):
                assert_same(undone[part], rank[way]["exact"][part])
        kept = [set(rank["undone"][way]["own_state"]) for rank in ranks[world_size]]
        matrices = set(range(9))
        assert set.union(*kept) == matrices | set(range(9, 13))
        assert not set.intersection(*kept) & matrices


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_what_a_step_communicates(ranks, world_size):
    """Three stacks of matrices, however many micro-batches; DDP's own traffic is not counted.

    The all-reduces are those of the small gradients and of a norm.
    """
    for rank in ranks[world_size]:
        assert rank["collectives"] == {
            "ddp": {"all_gather": 3},
            "parallel": {"reduce_scatter": 3, "all_reduce": 2, "all_gather": 3},
            "local": {"reduce_scatter": 3, "all_reduce": 2, "all_gather": 3},
        }


def locally_clipped(world_size: int) -> dict[str, Any]:
    """One process that clips every rank's gradient by its own norm, then takes their mean."""
    training = Training("alone", grad_clip_norm=None, **EXACT)
    parameters = list(training.model.parameters())
    for step in range(STEPS):
        x, y = batch(step)
        sums = [torch.zeros_like(p) for p in parameters]
        for x_part, y_part in zip(x.chunk(world_size), y.chunk(world_size), strict=True):
            training.optimizer.zero_grad()
            ((training.model(x_part) - y_part) ** 2).mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            for total, parameter in zip(sums, parameters, strict=True):
                if parameter.grad is not None:
                    total += parameter.grad / world_size
        for total, parameter in zip(sums, parameters, strict=True):
            if parameter.grad is not None:
                parameter.grad = total
        training.optimizer.step()
        training.norms.append(training.optimizer.grad_norm)
    return training.result()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_local_clip_is_the_reference_formula(ranks, world_size):
    local = ranks[world_size][0]["parallel"]["local"]
    expected = locally_clipped(world_size)
    assert_close(local, expected, ROUNDING)
    reduced = ranks[world_size][0]["parallel"]["exact"]
    difference = max(
        (local["weights"][name] - weight).abs().max().item()
        for name, weight in reduced["weights"].items()
    )
    assert difference > 100 * ROUNDING
    assert (local["norms"] > CLIP_NORM).all()


def test_local_clip_is_the_reduced_one_in_one_process(alone):
    for part in ("weights", "optimizer", "norms"):
        assert_same(alone["local"][part], alone["exact"][part])


def test_local_clip_is_refused_where_gradients_are_averaged_before(ranks):
    for results in ranks.values():
        for rank in results:
            assert "set trainer.strategy to parallel_muon" in rank["refusal"]


def test_parallel_muon_alone_is_muon(alone):
    """Reducing gradients in one process is nothing to do."""
    assert_same(train("parallel", **EXACT), alone["exact"])


@pytest.mark.slow
def test_compiled_ranks_are_one_eager_process(tmp_path, alone):
    results = in_ranks(tmp_path / "compiled", 2)
    for way in WAYS:
        assert_same(results[0][way]["weights"], results[1][way]["weights"])
        assert_close(results[0][way], alone["exact"], ROUNDING)
