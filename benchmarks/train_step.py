"""Time of one training step, by part: python benchmarks/train_step.py --config configs/pr236.yaml.

Forward and backward of one micro-batch, and the optimizer step, on made-up tokens and one device,
without a Trainer: median over repeats, tokens per second, MFU and peak memory as JSON on the last
line. ``--top N`` also prints the N kernels that take longest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import yaml
from jsonargparse import ArgumentParser

from pgl.model import GPTConfig
from pgl.module import GolfModule
from pgl.objective import training_loss
from pgl.optim import build_optimizer

PEAK_FLOPS = 785e12  # bf16 matrix product 8192^3, measured on one H200


def flops_per_token(config: GPTConfig, seq_len: int) -> float:
    """Return floating-point operations of forward and backward: matrices and causal attention."""
    dim, kv_dim = config.model_dim, config.kv_dim
    matrices = 2 * dim * dim + 2 * dim * kv_dim + 2 * dim * config.mlp_hidden
    attention = dim * seq_len  # 2 products x 2 operations x half of the square
    head = config.vocab_size * dim
    return 6 * (config.num_layers * matrices + head) + 6 * config.num_layers * attention


def median_ms(work: Callable[[], None], repeats: int, device: torch.device) -> tuple[float, float]:
    """Return the median and the spread (max - min) of a call's milliseconds."""
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), max(times) - min(times)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--config", required=True)
    arguments.add_argument("--micro-batch-tokens", type=int)
    arguments.add_argument("--backend", default="auto")
    arguments.add_argument("--repeats", type=int, default=20)
    arguments.add_argument("--top", type=int, default=0)
    options = arguments.parse_args()
    with open(options.config) as file:
        recipe = yaml.safe_load(file)
    parser = ArgumentParser()
    parser.add_class_arguments(GolfModule, "model", instantiate=True)
    parsed = parser.parse_object({"model": recipe["model"]})
    parsed.model.gpt.attention_backend = options.backend
    module: GolfModule = parser.instantiate(parsed).model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpt = module.gpt.to(device)
    gpt.prepare_attention(device)
    optimizer = build_optimizer(gpt, module.optimizer_config)
    seq_len = recipe["data"]["seq_len"]
    tokens = options.micro_batch_tokens or recipe["data"]["batch_tokens"] // 8
    ids = torch.randint(module.gpt_config.vocab_size, (tokens // seq_len, seq_len), device=device)
    targets = ids.roll(-1, 1)
    gamma = torch.tensor(module.loss_config.mile_gamma, device=device)
    loss_function = torch.compile(
        training_loss, fullgraph=True, dynamic=False, disable=not module.compile_model
    )

    def micro_batch() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_function(gpt, ids, targets, module.loss_config, gamma)
        loss.backward()

    start = time.perf_counter()
    micro_batch()
    optimizer.step()
    _wait(device)
    first_seconds = time.perf_counter() - start
    micro_ms, micro_spread = median_ms(micro_batch, options.repeats, device)
    step_ms, step_spread = median_ms(optimizer.step, options.repeats, device)
    accumulate = recipe["data"]["batch_tokens"] // tokens
    per_second = recipe["data"]["batch_tokens"] / (accumulate * micro_ms + step_ms) * 1e3
    if options.top:
        with torch.profiler.profile(acc_events=True) as profile:
            micro_batch()
            _wait(device)
        sort = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=sort, row_limit=options.top))
    result = {
        "config": options.config,
        "micro_batch_tokens": tokens,
        "compile_seconds": round(first_seconds, 1),
        "forward_backward_ms": round(micro_ms, 2),
        "forward_backward_spread_ms": round(micro_spread, 2),
        "optimizer_ms": round(step_ms, 2),
        "optimizer_spread_ms": round(step_spread, 2),
        "tokens_per_second": round(per_second),
        "mfu": round(per_second * flops_per_token(module.gpt_config, seq_len) / PEAK_FLOPS, 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if device.type == "cuda"
        else None,
    }
    print(json.dumps(result))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
