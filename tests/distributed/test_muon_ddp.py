"""MuonAdamW under plain DDP: replicas bit-identical, equal to one process within rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pgl.optim import MuonAdamW

REPOSITORY = Path(__file__).resolve().parents[2]
FORMATS = ("float32", "bfloat16", "int8")
STEPS = 4
BATCH = 12


class Model(nn.Module):
    """Stacks of 5, 1 and 1 matrices (one never used, so without gradient), and two vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(5)])
        self.up = nn.Linear(8, 20, bias=False)
        self.unused = nn.Linear(6, 4, bias=False)
        self.gain = nn.Parameter(torch.ones(8))
        self.bias = nn.Parameter(torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * self.gain
        return self.up(x) + self.bias


def train(momentum_format: str, ns_dtype: torch.dtype) -> dict[str, object]:
    """Train on this rank's part of each batch; return weights and optimizer state."""
    torch.manual_seed(0)
    model = Model()
    distributed = dist.is_initialized()
    rank = dist.get_rank() if distributed else 0
    world_size = dist.get_world_size() if distributed else 1
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if distributed else model
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = MuonAdamW(
        [
            {"kind": "muon", "name": "matrix", "params": matrices, "weight_decay": 0.1},
            {"kind": "adamw", "name": "scalar", "params": vectors},
        ],
        grad_clip_norm=0.3,
        momentum_format=momentum_format,
        ns_dtype=ns_dtype,
    )
    norms = []
    for _ in range(STEPS):
        x, y = torch.randn(BATCH, 8), torch.randn(BATCH, 20)
        part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        optimizer.zero_grad()
        ((wrapped(x[part]) - y[part]) ** 2).mean().backward()
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return {
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "norms": torch.stack(norms),
    }


def run_all() -> dict[str, dict[str, object]]:
    torch.set_num_threads(1)
    runs = {name: train(name, torch.bfloat16) for name in FORMATS}
    return {**runs, "exact": train("float32", torch.float64)}


def worker(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    torch.save(run_all(), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def assert_same(a: object, b: object) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def single_process() -> dict[str, dict[str, object]]:
    return run_all()


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_replicas_agree(
    world_size: int, tmp_path: Path, single_process: dict[str, dict[str, object]]
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world_size), str(tmp_path)], env=environment
        )
        for rank in range(world_size)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * world_size
    finally:
        for process in processes:
            process.kill()
    results = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world_size)]
    for other in results[1:]:
        assert_same(other, results[0])
    # In float64 only the order of summation differs; bf16 iterations are chaotic in the last bits.
    tolerances = {"exact": 1e-5, **dict.fromkeys(FORMATS, 5e-3)}
    for run, tolerance in tolerances.items():
        ours, alone = results[0][run], single_process[run]
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(ours["weights"][name], weight, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours["norms"], alone["norms"], rtol=2e-2, atol=0)
        assert ours["optimizer"]["state"].keys() == alone["optimizer"]["state"].keys()


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
