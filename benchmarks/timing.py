"""What the benchmarks share: recipes, processes, and times of calls that may run on a GPU."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from jsonargparse import ArgumentParser

from pgl.module import GolfModule
from pgl.optim.ranks import Ranks

PEAK_FLOPS = 785e12  # bf16 matrix product 8192^3, measured on one H200
STRATEGIES = ("ddp", "parallel_muon")

T = TypeVar("T")


def load_recipe(
    path: str, backend: str = "auto", kernels: str = "auto"
) -> tuple[dict[str, Any], GolfModule]:
    """Return a configuration file's contents and its module, with these kernels."""
    with open(path) as file:
        recipe = yaml.safe_load(file)
    gpt = {**recipe["model"]["gpt"], "attention_backend": backend, "kernels": kernels}
    return recipe, make(GolfModule, {**recipe["model"], "gpt": gpt})


def make(kind: type[T], values: dict[str, Any]) -> T:
    """Return an instance of a class from the values that a configuration file gives it."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "made", instantiate=True)
    return parser.instantiate(parser.parse_object({"made": values})).made


@contextmanager
def processes() -> Iterator[tuple[torch.device, Ranks]]:
    """Give the device and place of this process; join the others if torchrun started several."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if not dist.is_torchelastic_launched():
        yield torch.device(kind), Ranks()
        return
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    yield device, Ranks.of(None)
    dist.barrier()
    dist.destroy_process_group()


def median_ms(work: Callable[[], None], repeats: int, device: torch.device) -> tuple[float, float]:
    """Return the median and the spread (max - min) of a call's milliseconds."""
    return median_and_spread(times_ms(work, repeats, device))


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """Return the median of some times and the spread (max - min) around it."""
    return statistics.median(times), max(times) - min(times)


def times_ms(work: Callable[[], None], repeats: int, device: torch.device) -> list[float]:
    """Return the milliseconds of each of a call's repeats."""
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def wait(device: torch.device) -> None:
    """Wait for everything that was queued on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def collective_ms(work: Callable[[], None], device: torch.device, steps: int = 4) -> float:
    """Return the mean milliseconds that NCCL's kernels, or gloo's operations, take in a call.

    They include waiting for other ranks. All ranks must call it. A call before those that count
    lets all profilers start, which takes longer on one rank than on another.
    """
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, acc_events=True) as profile:
        for _ in range(1 + steps):
            work()
            wait(device)
            profile.step()
    microseconds = 0.0
    for event in profile.key_averages():
        if event.key.startswith("nccl") and event.device_type.name == "CUDA":
            microseconds += event.self_device_time_total
        elif event.key.startswith("gloo:"):
            microseconds += event.cpu_time_total
    return microseconds / 1e3 / steps


def peak_memory_gib(device: torch.device) -> float | None:
    """Return the most memory that was in use on a GPU."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
