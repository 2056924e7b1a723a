"""Time of one training step, by part: python benchmarks/train_step.py --config configs/pr236.yaml.

Forward and backward of one micro-batch, the optimizer step, and the whole step with all its
micro-batches, on made-up tokens, without a Trainer: medians over repeats, tokens per second over
all GPUs, MFU and peak memory as JSON on the last line. ``--top N`` also prints the N kernels that
take longest. ``--qat`` also times the whole step of a recipe with fake quantisation, in turn
without and with it. On several GPUs, with either strategy:

    torchrun --nproc-per-node 8 benchmarks/train_step.py --config ... --strategy parallel_muon
"""

import argparse
import json
import time
from contextlib import nullcontext
from typing import Any

import torch
from timing import (
    PEAK_FLOPS,
    STRATEGIES,
    collective_ms,
    load_recipe,
    make,
    median_and_spread,
    median_ms,
    peak_memory_gib,
    processes,
    times_ms,
    wait,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pgl.model import GPTConfig
from pgl.model.linear import set_fake_quantization
from pgl.module import GolfModule
from pgl.objective import training_loss
from pgl.optim import build_optimizer
from pgl.optim.ranks import Ranks
from pgl.quant import FakeQuantConfig

QAT_ROUNDS = 2  # without, with, without, with: so that a drift of the clock hits both alike


class TrainStep(nn.Module):
    """A training step without its Trainer: micro-batches, reduction, optimizer.

    Args:
        module: The module that the step trains.
        strategy: Who averages gradients if there are several processes.
        ranks: The processes.
        device: Of this process.
        ids: Tokens of one micro-batch (sequences, length).
        accumulate: Micro-batches of a step.
    """

    def __init__(
        self,
        module: GolfModule,
        strategy: str,
        ranks: Ranks,
        device: torch.device,
        ids: Tensor,
        accumulate: int,
    ) -> None:
        super().__init__()
        self.gpt = module.gpt
        self.loss_config = module.loss_config
        self.ids, self.targets = ids, ids.roll(-1, 1)
        self.gamma = torch.tensor(module.loss_config.mile_gamma, device=device)
        self.accumulate = accumulate
        self.loss = torch.compile(
            training_loss, fullgraph=True, dynamic=False, disable=not module.compile_model
        )
        self.optimizer = build_optimizer(
            self.gpt, module.optimizer_config, reduce_gradients=strategy == "parallel_muon"
        )
        # In a list: the wrapper must not become a part of what it wraps.
        use_ddp = ranks.count > 1 and strategy == "ddp"
        self._wrapped = [DistributedDataParallel(self)] if use_ddp else [self]

    def forward(self) -> Tensor:
        """Return the loss of the micro-batch."""
        with torch.autocast(self.ids.device.type, torch.bfloat16):
            return self.loss(self.gpt, self.ids, self.targets, self.loss_config, self.gamma)

    def micro_batch(self) -> None:
        """Forward and backward, without communication."""
        self.forward().backward()

    def whole_step(self) -> None:
        """All micro-batches, the last of which communicates under DDP, and the optimizer."""
        [wrapped] = self._wrapped
        quiet = getattr(wrapped, "no_sync", nullcontext)
        for index in range(self.accumulate):
            with quiet() if index + 1 < self.accumulate else nullcontext():
                wrapped().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def optimizer_step(self) -> None:
        """The optimizer alone, on the gradients that are there."""
        self.optimizer.step()


def flops_per_token(config: GPTConfig, seq_len: int) -> float:
    """Return floating-point operations of forward and backward: matrices and causal attention."""
    dim, kv_dim = config.model_dim, config.kv_dim
    matrices = 2 * dim * dim + 2 * dim * kv_dim + 2 * dim * config.mlp_hidden
    attention = dim * seq_len  # 2 products x 2 operations x half of the square
    head = config.vocab_size * dim
    return 6 * (config.num_layers * matrices + head) + 6 * config.num_layers * attention


def measure(
    options: argparse.Namespace, device: torch.device, ranks: Ranks
) -> tuple[TrainStep, dict[str, Any]]:
    """Return the step and its times."""
    recipe, module = load_recipe(options.config, options.backend, options.kernels)
    layers = qat_layers(recipe, options.config) if options.qat else None
    seq_len, batch_tokens = recipe["data"]["seq_len"], recipe["data"]["batch_tokens"]
    tokens = options.micro_batch_tokens or batch_tokens // 8
    accumulate = batch_tokens // (tokens * ranks.count)
    if accumulate * tokens * ranks.count != batch_tokens:
        raise SystemExit(
            f"{batch_tokens} tokens are no whole number of micro-batches of {tokens} tokens on "
            f"{ranks.count} devices: set --micro-batch-tokens"
        )
    module.gpt.to(device).prepare(device)
    ids = torch.randint(module.gpt_config.vocab_size, (tokens // seq_len, seq_len), device=device)
    step = TrainStep(module, options.strategy, ranks, device, ids, accumulate)

    start = time.perf_counter()
    step.whole_step()
    wait(device)
    first_seconds = time.perf_counter() - start
    whole_ms, whole_spread = median_ms(step.whole_step, options.repeats, device)
    in_collectives = collective_ms(step.whole_step, device)
    micro_ms, micro_spread = median_ms(step.micro_batch, options.repeats, device)
    optimizer_ms, optimizer_spread = median_ms(step.optimizer_step, options.repeats, device)
    per_second = batch_tokens / whole_ms * 1e3
    mfu = per_second * flops_per_token(module.gpt_config, seq_len) / (PEAK_FLOPS * ranks.count)
    result = {
        "config": options.config,
        "processes": ranks.count,
        "strategy": options.strategy if ranks.count > 1 else None,
        "backend": options.backend,
        "kernels": options.kernels,
        "micro_batch_tokens": tokens,
        "accumulate": accumulate,
        "compile_seconds": round(first_seconds, 1),
        "step_ms": round(whole_ms, 2),
        "step_spread_ms": round(whole_spread, 2),
        "forward_backward_ms": round(micro_ms, 2),
        "forward_backward_spread_ms": round(micro_spread, 2),
        "optimizer_ms": round(optimizer_ms, 2),
        "optimizer_spread_ms": round(optimizer_spread, 2),
        "collectives_share": round(in_collectives / whole_ms, 4),
        "tokens_per_second": round(per_second),
        "mfu": round(mfu, 4),
        "peak_memory_gib": peak_memory_gib(device),
    }
    if layers is not None:
        result |= measure_qat(step, layers, options.repeats, device)
    return step, result


def qat_layers(recipe: dict[str, Any], path: str) -> FakeQuantConfig:
    """Return a recipe's ``qat.layers``."""
    layers = (recipe.get("qat") or {}).get("layers")
    if not layers:
        raise SystemExit(f"--qat: {path} has no qat.layers")
    return make(FakeQuantConfig, layers)


def measure_qat(
    step: TrainStep, layers: FakeQuantConfig, repeats: int, device: torch.device
) -> dict[str, float]:
    """Return the times of the whole step without and with fake quantisation, on one model."""
    variants = {"off": None, "on": layers}

    def switch(name: str) -> None:
        rounded = set_fake_quantization(step.gpt, variants[name])
        if name == "on" and not rounded:
            raise SystemExit(f"--qat: qat.layers ({layers}) rounds no layer of this model")
        step.whole_step()  # compiles, or finds its graph again, outside of what is timed

    for name in variants:
        switch(name)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(QAT_ROUNDS):
        for name in variants:
            switch(name)
            times[name] += times_ms(step.whole_step, repeats, device)
    set_fake_quantization(step.gpt, None)
    (off_ms, off_spread), (on_ms, on_spread) = map(median_and_spread, times.values())
    return {
        "qat_off_ms": round(off_ms, 2),
        "qat_off_spread_ms": round(off_spread, 2),
        "qat_on_ms": round(on_ms, 2),
        "qat_on_spread_ms": round(on_spread, 2),
        "qat_cost_percent": round(100 * (on_ms / off_ms - 1), 2),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--config", required=True)
    arguments.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    arguments.add_argument("--micro-batch-tokens", type=int)
    arguments.add_argument("--backend", default="auto", help="attention backend")
    arguments.add_argument("--kernels", default="auto", help="model.gpt.kernels")
    arguments.add_argument("--repeats", type=int, default=20)
    arguments.add_argument("--top", type=int, default=0)
    arguments.add_argument("--qat", action="store_true", help="time fake quantisation as well")
    options = arguments.parse_args()
    with processes() as (device, ranks):
        step, result = measure(options, device, ranks)
        if ranks.rank == 0:
            if options.top:
                with torch.profiler.profile(acc_events=True) as profile:
                    step.micro_batch()
                    wait(device)
                cuda = device.type == "cuda"
                sort = "self_cuda_time_total" if cuda else "self_cpu_time_total"
                print(profile.key_averages().table(sort_by=sort, row_limit=options.top))
            print(json.dumps(result))


if __name__ == "__main__":
    main()
