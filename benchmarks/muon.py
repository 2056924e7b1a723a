"""Time of one optimizer step: python benchmarks/muon.py --config configs/pr236.yaml.

MuonAdamW alone, on made-up gradients, without a model's forward and backward pass. On several GPUs:

    torchrun --nproc-per-node 8 benchmarks/muon.py --config configs/pr236.yaml

Then both strategies are measured. Under DDP gradients are averaged during backward, which is not
part of the optimizer's step: ``gradient_all_reduce_ms`` is what that takes by itself, with nothing
to hide behind. Parallel Muon does it within its step. Medians, spreads (max - min) and profiled
milliseconds of rank 0 as JSON on the last line.
"""

import argparse
import json
from typing import Any

import torch
import torch.distributed as dist
from timing import (
    STRATEGIES,
    collective_ms,
    load_recipe,
    median_ms,
    peak_memory_gib,
    processes,
    wait,
)

from pgl.model import GPT
from pgl.optim import MuonAdamW, OptimizerConfig, build_optimizer
from pgl.optim.ranks import Ranks

WARM_UP_STEPS = 5


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--config", required=True)
    arguments.add_argument("--repeats", type=int, default=50)
    arguments.add_argument("--top", type=int, default=0)
    options = arguments.parse_args()
    _, module = load_recipe(options.config)
    result: dict[str, Any] = {"config": options.config}
    with processes() as (device, ranks):
        gpt = module.gpt.to(device)
        result["processes"] = ranks.count
        result["parameters"] = sum(p.numel() for p in gpt.parameters())
        for strategy in STRATEGIES if ranks.count > 1 else STRATEGIES[:1]:
            result["single" if ranks.count == 1 else strategy] = measure(
                gpt, module.optimizer_config, strategy, ranks, device, options
            )
        if ranks.count > 1:
            result["gradient_all_reduce_ms"] = all_reduce_ms(gpt, options.repeats, device)
        result["peak_memory_gib"] = peak_memory_gib(device)
        if ranks.rank == 0:
            print(json.dumps(result))


def measure(
    gpt: GPT,
    config: OptimizerConfig,
    strategy: str,
    ranks: Ranks,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return the times of one strategy's step."""
    optimizer = build_optimizer(gpt, config, reduce_gradients=strategy == "parallel_muon")
    generator = torch.Generator(device).manual_seed(ranks.rank)
    for parameter in gpt.parameters():
        parameter.grad = torch.randn(
            parameter.shape, generator=generator, device=device, dtype=parameter.dtype
        )

    def step() -> None:
        optimizer.step()

    for _ in range(WARM_UP_STEPS):
        step()
    median, spread = median_ms(step, options.repeats, device)
    if options.top:
        print_kernels(optimizer, device, options.top if ranks.rank == 0 else 0)
    in_collectives = collective_ms(step, device)
    return {
        "step_ms": round(median, 3),
        "spread_ms": round(spread, 3),
        "collectives_ms": round(in_collectives, 3),
        "momentum_mib": round(optimizer.momentum_bytes() / 2**20, 2),
    }


def print_kernels(optimizer: MuonAdamW, device: torch.device, rows: int) -> None:
    """Print the kernels of a step that take longest."""
    with torch.profiler.profile(acc_events=True) as profile:
        optimizer.step()
        wait(device)
    sort = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    if rows:
        print(profile.key_averages().table(sort_by=sort, row_limit=rows))


def all_reduce_ms(gpt: GPT, repeats: int, device: torch.device) -> float:
    """Return the median time of summing all gradients over the ranks, in one float32 tensor."""
    flat = torch.zeros(sum(parameter.numel() for parameter in gpt.parameters()), device=device)

    def reduce() -> None:
        dist.all_reduce(flat)

    reduce()
    return round(median_ms(reduce, repeats, device)[0], 3)


if __name__ == "__main__":
    main()
