"""What the ranks of :mod:`test_muon_ddp` run: the optimizer alone, with gradients of one batch."""

import copy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pgl.optim import MuonAdamW
from pgl.optim.ranks import Ranks

FORMATS = ("float32", "bfloat16", "int8")
STEPS = 4
BATCH = 12
CLIP_NORM = 0.3


class Model(nn.Module):
    """Stacks of 7, 1 and 1 matrices (one never used, so without gradient), and small tensors."""

    def __init__(self, table_dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(7)])
        self.up = nn.Linear(8, 20, bias=False)
        self.unused = nn.Linear(6, 4, bias=False)
        self.gain = nn.Parameter(torch.ones(8))
        self.bias = nn.Parameter(torch.zeros(20))
        self.table = nn.Parameter(torch.zeros(20, dtype=table_dtype))
        self.unused_gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * self.gain
        return self.up(x) + self.bias + self.table


class Training:
    """A model and its optimizer, in this rank's place or alone.

    Args:
        way: "ddp" (gradients averaged before the optimizer), "parallel" (averaged by it), or
            "alone".
        options: Of the optimizer.
    """

    def __init__(self, way: str, **options: Any) -> None:
        torch.manual_seed(0)
        exact = options.get("ns_dtype") == torch.float64
        self.model = Model(torch.float32 if exact else torch.bfloat16)
        self.ranks = Ranks() if way == "alone" else Ranks.of(None)
        self.wrapped: nn.Module = self.model
        if way == "ddp":
            self.wrapped = DistributedDataParallel(self.model, find_unused_parameters=True)
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = MuonAdamW(
            [
                {"kind": "muon", "name": "matrix", "params": matrices, "weight_decay": 0.1},
                {"kind": "adamw", "name": "scalar", "params": vectors},
            ],
            **{"grad_clip_norm": CLIP_NORM, "reduce_gradients": way == "parallel", **options},
        )
        self.norms: list[Tensor] = []

    def steps(self, first: int, last: int, micro_batches: int = 1) -> None:
        """Take steps on this rank's part of each batch."""
        for step in range(first, last):
            x, y = batch(step)
            self.optimizer.zero_grad()
            for part in self._parts(micro_batches):
                error = (self.wrapped(x[part]) - y[part]) ** 2
                (error.mean() / micro_batches).backward()
            self.optimizer.step()
            self.norms.append(self.optimizer.grad_norm)

    def result(self) -> dict[str, Any]:
        """Return weights, whole optimizer state, gradient norms and bytes of momentum."""
        self.optimizer.consolidate_state_dict()
        return copy.deepcopy(
            {
                "weights": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "norms": torch.stack(self.norms),
                "momentum_bytes": self.optimizer.momentum_bytes(),
            }
        )

    def restore(self, result: dict[str, Any]) -> None:
        """Go on from a result."""
        self.model.load_state_dict(result["weights"])
        self.optimizer.load_state_dict(result["optimizer"])

    def _parts(self, micro_batches: int) -> list[slice]:
        size = BATCH // self.ranks.count // micro_batches
        first = self.ranks.rank * size * micro_batches
        return [slice(first + i * size, first + (i + 1) * size) for i in range(micro_batches)]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a step, the same on all ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 8, generator=generator)
    return x, torch.randn(BATCH, 20, generator=generator)


def train(way: str, steps: int = STEPS, micro_batches: int = 1, **options: Any) -> dict[str, Any]:
    """Return the result of a training."""
    training = Training(way, **options)
    training.steps(0, steps, micro_batches)
    return training.result()


EXACT = {"ns_dtype": torch.float64}
"""Only the order of summation differs then, and no rounding to bfloat16 makes more of it."""


def run_way(way: str, half: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the results of every training in one way.

    Args:
        way: See :class:`Training`.
        half: A result after half of the steps, to go on from.
    """
    results = {name: train(way, momentum_format=name) for name in FORMATS}
    results["exact"] = train(way, **EXACT)
    results["exact_int8"] = train(way, momentum_format="int8", **EXACT)
    results["unclipped"] = train(way, grad_clip_norm=None, **EXACT)
    results["accumulated"] = train(way, micro_batches=2, **EXACT)
    results["half"] = train(way, steps=STEPS // 2, **EXACT)
    if way != "ddp":
        results["local"] = train(way, clip="local", **EXACT)
    if half is not None:
        training = Training(way, **EXACT)
        training.steps(0, 1)  # other state, which loading has to replace
        training.restore(half)
        training.steps(STEPS // 2, STEPS)
        results["resumed"] = training.result()
    return results


def undone_steps(way: str) -> dict[str, Any]:
    """Return the result of a training that took back two steps, each rank from its own state."""
    training = Training(way, **EXACT)
    training.steps(0, 1)
    weights = copy.deepcopy(training.model.state_dict())
    own = copy.deepcopy(training.optimizer.state_dict())
    training.steps(1, 3)
    training.restore({"weights": weights, "optimizer": own})
    training.norms = training.norms[:1]
    training.steps(1, STEPS)
    return {**training.result(), "own_state": sorted(own["state"])}


def collectives_of_a_step(way: str, **options: Any) -> dict[str, int]:
    """Return how many collectives the optimizer starts in a step of two micro-batches."""
    training = Training(way, **options)
    counts: Counter[str] = Counter()
    originals = {name: getattr(Ranks, name) for name in ("reduce_scatter", "all_gather")}
    originals["all_reduce"] = Ranks.all_reduce
    for name, original in originals.items():

        def counted(self: Ranks, tensor: Tensor, name: str = name, call: Any = original) -> Any:
            counts[name] += 1
            return call(self, tensor)

        setattr(Ranks, name, counted)
    try:
        training.steps(0, 1, micro_batches=2)
    finally:
        for name, original in originals.items():
            setattr(Ranks, name, original)
    return dict(counts)


def refusal() -> str:
    """Return what is said to local clipping under DDP."""
    try:
        Training("ddp", clip="local")
    except ValueError as error:
        return str(error)
    return ""


def everything(half: Path) -> dict[str, Any]:
    """Return the results of every training in both ways, and what else the tests look at."""
    start = torch.load(half, weights_only=True)
    results: dict[str, Any] = {way: run_way(way, start) for way in ("ddp", "parallel")}
    results["undone"] = {way: undone_steps(way) for way in ("ddp", "parallel")}
    results["collectives"] = {
        "ddp": collectives_of_a_step("ddp"),
        "parallel": collectives_of_a_step("parallel"),
        "local": collectives_of_a_step("parallel", clip="local"),
    }
    results["refusal"] = refusal()
    return results


def compiled() -> dict[str, Any]:
    """Return the results of both ways with compiled arithmetic."""
    return {way: train(way, compile=True, **EXACT) for way in ("ddp", "parallel")}


def worker(rank: int, world_size: int, folder: Path, half: Path | None) -> None:
    """Run everything as one rank, or without ``half`` what is compiled; leave results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    torch.save(compiled() if half is None else everything(half), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(
        int(sys.argv[1]),
        int(sys.argv[2]),
        Path(sys.argv[3]),
        Path(sys.argv[4]) if len(sys.argv) > 4 else None,
    )
