"""What the Trainer costs: its steps against a bare loop, and the GPU's idle time.

    python benchmarks/trainer_overhead.py --config configs/pr703.yaml --data.batch_tokens 98304 ...

takes the options of ``pgl fit``. It trains ``WARM + TIMED + TRACED`` steps: the first fill caches,
the next are timed by the clock, and of the last every kernel is traced. Then a bare loop runs as
many steps of the same compiled module on the same shapes. Prints JSON on the last line.
"""

import json
import sys
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile

from pgl.cli import TRAINER_DEFAULTS, GolfCLI, GolfParser
from pgl.data import TokenDataModule
from pgl.module import GolfModule
from pgl.trainer import GolfTrainer

WARM, TIMED, TRACED = 10, 20, 10
AFTER_TRAINING = ("GPTQExport", "SlidingWindowBPB", "RunReport")


class StepClock(pl.Callback):
    """Times some steps of a fit, and traces the kernels of some more."""

    def __init__(self) -> None:
        self.step_ms = 0.0
        self.trace: dict[str, float] = {}
        self._profile: profile | None = None
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start and stop at the steps' borders."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if trainer.global_step == WARM:
            _wait()
            self._start = time.perf_counter()
        elif trainer.global_step == WARM + TIMED:
            _wait()
            self.step_ms = 1e3 * (time.perf_counter() - self._start) / TIMED
            if torch.cuda.is_available():
                self._profile = profile(activities=[ProfilerActivity.CUDA])
                self._profile.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Stop the trace after the last step."""
        if trainer.global_step == WARM + TIMED + TRACED and self._profile is not None:
            _wait()
            self._profile.stop()
            self.trace = busy_share(self._profile)
            self._profile = None


def busy_share(trace: profile) -> dict[str, float]:
    """Return the traced span in ms and the share of it in which no kernel or copy ran."""
    events = trace.profiler.kineto_results.events()
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0
    )
    busy, reached = 0, spans[0][0]
    gaps: list[tuple[int, str]] = []
    for start, stop, name in spans:
        if start > reached:
            gaps.append((start - reached, name))
        busy += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    span = reached - spans[0][0]
    for gap, name in sorted(gaps, reverse=True)[:12]:
        print(f"  idle {gap / 1e3:9.1f} us before {name[:90]}")
    return {
        "traced_ms": round(span / 1e6, 2),
        "idle_percent": round(100 * (span - busy) / span, 2),
        "kernels": len(spans),
    }


def bare_loop(module: GolfModule, data: TokenDataModule, trainer: pl.Trainer) -> float:
    """Return ms a step of a loop that only trains: the same compiled loss and optimizer."""
    optimizer = module.optimizers(use_pl_optimizer=False)
    layout = data.layout
    module.train().to(trainer.strategy.root_device)  # the Trainer has taken it off the device
    shape = (layout.sequences, layout.seq_len + 1)
    batches = [
        torch.randint(module.gpt_config.vocab_size, shape, dtype=torch.int32) for _ in range(4)
    ]
    if torch.cuda.is_available():
        batches = [batch.pin_memory() for batch in batches]
    start, done = 0.0, 0
    for step in range(WARM + TIMED):
        if step == WARM:
            _wait()
            start = time.perf_counter()
        for _ in range(layout.accumulate):
            tokens = batches[done % len(batches)].to(module.device, non_blocking=True)
            done += 1
            with trainer.precision_plugin.train_step_context():
                loss = module._training_loss(
                    module.gpt,
                    tokens[:, :-1].contiguous(),
                    tokens[:, 1:].long(),
                    module.loss_config,
                    module.mile_gamma,
                )
            (loss / layout.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait()
    return 1e3 * (time.perf_counter() - start) / TIMED


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(folder)))


def measure(folder: str) -> dict[str, Any]:
    """Return the times of both loops; what a run writes goes into a folder."""
    steps = WARM + TIMED + TRACED
    budget = [
        "--budget.seconds",
        "null",
        "--budget.steps",
        str(steps),
        "--budget.reserve_seconds=0",
    ]
    cli = GolfCLI(
        GolfModule,
        TokenDataModule,
        trainer_class=GolfTrainer,
        trainer_defaults={
            **TRAINER_DEFAULTS,
            "logger": False,
            "default_root_dir": folder,
        },
        parser_class=GolfParser,
        auto_configure_optimizers=False,
        save_config_callback=None,
        args=[*sys.argv[1:], *budget],
        run=False,
    )
    clock = StepClock()
    for callback in cli.trainer.callbacks:
        if type(callback).__name__ in AFTER_TRAINING:
            callback.on_train_end = lambda *_: None
    cli.trainer.callbacks.append(clock)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    bare_ms = bare_loop(cli.model, cli.datamodule, cli.trainer)
    return {
        "batch_tokens": cli.datamodule.batch_tokens,
        "accumulate": cli.datamodule.layout.accumulate,
        "trainer_ms": round(clock.step_ms, 2),
        "bare_loop_ms": round(bare_ms, 2),
        "overhead_percent": round(100 * (clock.step_ms / bare_ms - 1), 2),
        **clock.trace,
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
