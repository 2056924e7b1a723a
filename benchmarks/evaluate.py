"""Speed of sliding-window scoring: python benchmarks/evaluate.py --config configs/pr703.yaml.

Scores made-up tokens with the model of a recipe as a run does at its end: windows gathered on the
device, bfloat16 autocast, sums in float64, progress read back. Windows per second, and their share
of the floor: the time that the matrix products and attention of the scored positions take at the
device's measured matrix rate. JSON on the last line. ``--top N`` also prints the N kernels that
take longest.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from timing import PEAK_FLOPS, load_recipe, median_ms, wait

from pgl.evaluate import (
    BitsPerByte,
    ByteTable,
    CompiledScorer,
    ScoreMap,
    WindowLoader,
    evaluate_windows,
    score_batch,
)
from pgl.model import GPTConfig


def window_flops(config: GPTConfig, seq_len: int, last: int) -> float:
    """Return floating-point operations of one window of which the last targets are scored.

    Multiply and add count as two. Every layer but the last works on the whole window; the last one
    needs keys and values of the whole window and everything else of the scored positions.
    """
    dim, kv_dim = config.model_dim, config.kv_dim
    queries_and_mlp = 2 * dim * dim + 2 * dim * config.mlp_hidden
    keys_and_values = 2 * dim * kv_dim
    whole = 2 * (queries_and_mlp + keys_and_values) * seq_len + 2 * dim * seq_len**2
    pairs = last * (seq_len - last) + last**2 / 2
    short = 2 * keys_and_values * seq_len + 2 * queries_and_mlp * last + 4 * dim * pairs
    return (config.num_layers - 1) * whole + short + 2 * config.vocab_size * dim * last


def options_of_command_line() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--config", required=True)
    arguments.add_argument("--seq-len", type=int, default=2048)
    arguments.add_argument("--stride", type=int, default=64)
    arguments.add_argument("--batch-windows", type=int, help="default: as in a run")
    arguments.add_argument("--windows", type=int, default=4096, help="windows that are timed")
    arguments.add_argument("--backend", default="auto", help="attention backend")
    arguments.add_argument("--eager", action="store_true", help="without torch.compile")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--top", type=int, default=0)
    return arguments.parse_args()


def made_up_windows(
    windows: int, options: argparse.Namespace, vocab_size: int, device: torch.device
) -> WindowLoader:
    """Return windows of random tokens: one that scores all of its targets, each other a stride."""
    tokens = torch.randint(vocab_size, (options.seq_len + windows * options.stride + 1,))
    return WindowLoader(
        tokens,
        seq_len=options.seq_len,
        stride=options.stride,
        batch_windows=options.batch_windows,
        device=device,
    )


def print_slowest_kernels(run: Callable[[], None], count: int, device: torch.device) -> None:
    with torch.profiler.profile(acc_events=True) as profile:
        run()
        wait(device)
    sort = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=sort, row_limit=count))


def main() -> None:
    options = options_of_command_line()
    _, module = load_recipe(options.config, options.backend)
    config = module.gpt_config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpt = module.gpt.to(device).eval()
    gpt.prepare(device)
    metric = BitsPerByte(made_up_table(config.vocab_size))
    score = score_batch if options.eager or not module.compile_model else CompiledScorer()

    def loader(windows: int) -> WindowLoader:
        return made_up_windows(windows, options, config.vocab_size, device)

    def evaluate(windows: WindowLoader) -> None:
        score_map = ScoreMap(windows.num_targets, windows.seq_len, device)
        evaluate_windows(
            gpt,
            windows,
            metric,
            device=device,
            autocast_dtype=torch.bfloat16 if device.type == "cuda" else None,
            on_batch=lambda bpb: None,
            on_scores=score_map.add,
            score=score,
        )

    start = time.perf_counter()
    first = loader(1)
    evaluate(first)
    wait(device)
    compile_seconds = time.perf_counter() - start
    timed = loader(options.windows)
    ms, spread_ms = median_ms(lambda: evaluate(timed), options.repeats, device)
    if options.top:
        one_batch = loader(first.batch_windows)
        print_slowest_kernels(lambda: evaluate(one_batch), options.top, device)
    per_second = (options.windows + 1) / ms * 1e3
    floor_per_second = PEAK_FLOPS / window_flops(config, options.seq_len, options.stride)
    print(
        json.dumps(
            {
                "config": options.config,
                "seq_len": options.seq_len,
                "stride": options.stride,
                "batch_windows": timed.batch_windows,
                "backend": options.backend,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "compile_seconds": round(compile_seconds, 1),
                "seconds": round(ms / 1e3, 3),
                "spread_seconds": round(spread_ms / 1e3, 3),
                "windows_per_second": round(per_second, 1),
                "tokens_per_second": round(per_second * options.seq_len),
                "floor_windows_per_second": round(floor_per_second, 1),
                "share_of_floor": round(per_second / floor_per_second, 4),
                "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)
                if device.type == "cuda"
                else None,
            }
        )
    )


def made_up_table(vocab_size: int) -> ByteTable:
    """Return a byte table in which every token stands for two or three bytes."""
    id_V = torch.arange(vocab_size)
    return ByteTable(
        torch.full((vocab_size,), 2, dtype=torch.int16),
        id_V % 2 == 1,
        id_V < 4,
        "made up",
        "",
    )


if __name__ == "__main__":
    main()
