"""Train for a fixed time, count only the time that counts, and let every schedule follow it."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from pgl.optim import Progress
from pgl.phases import PhaseTimer
from pgl.signals import requested_signal
from pgl.warm_up import Variant, compiled_graphs, warm_up


class WallClockBudget(Callback):
    """Stops training when its time is used up, and tells the schedules how much is left.

    The clock starts after compilation and warm-up, stands still during validation, checkpointing
    and export, is the clock of rank 0 on every rank, and is saved in checkpoints, so that a resumed
    run continues with the time that is left. Training stops at the first optimizer step at or past
    ``seconds - reserve_seconds``.

    With ``seconds=None`` the budget is a number of optimizer steps, and so the same on any machine.
    With both, schedules follow the seconds alone and the steps only cut the run short: one that
    reaches its last step early ends before, or in the middle of, the warm-down. Setup warns of it.

    Note:
        On a GPU the host runs ahead of the device. The callback keeps it at most one step ahead by
        waiting for the step before the last, which leaves the queue filled, and adds the step in
        flight to the time it reports.

    Note:
        Ranks share two numbers per step through a CPU process group, so that no rank waits for its
        GPU to learn them: rank 0's clock, and whether any rank got SIGTERM or Ctrl-C
        (:class:`pgl.signals.StopSignals`). It takes about 0.3 ms between two
        processes on busy CPU cores (a pickled broadcast: 1 ms), in the shadow of the queued step.

    Note:
        Everything that the compiled step can be is compiled before the clock starts, a late start
        of fake quantisation included. Graphs that are compiled while the clock runs all the same
        are counted in the report and warned about.

    Example::

        trainer = Trainer(callbacks=[WallClockBudget(seconds=600, reserve_seconds=15)])
        # A recipe of 7,000 steps in the 405 that one device makes of three minutes:
        trainer = Trainer(callbacks=[WallClockBudget(seconds=180, step_scale=405 / 7000)])

    Args:
        seconds: Training time. None: run ``steps`` optimizer steps instead.
        steps: Optimizer steps after which training stops in any case; schedules follow them with
            ``seconds=None`` only. None: the Trainer's ``max_steps``, if it has any.
        reserve_seconds: Part of ``seconds`` kept for what must happen inside the budget after the
            last step, such as calibration.
        warmup_steps: Optimizer steps on made-up tokens before the clock starts. They compile and
            prime everything; weights, optimizer and random state are restored afterwards.
        step_scale: Steps of this run over those that the recipe was tuned for. Fits what the recipe
            counts in steps to a shorter run: warm-down, momentum warm-up, distances of snapshots
            and validations, and the EMA's decay d, which becomes ``d ** (1 / step_scale)``.

    Raises:
        ValueError: If a number is out of range, or neither seconds nor steps are given.
    """

    def __init__(
        self,
        seconds: float | None = 600.0,
        steps: int | None = None,
        reserve_seconds: float = 0.0,
        warmup_steps: int = 3,
        step_scale: float = 1.0,
    ) -> None:
        if seconds is not None and seconds <= 0:
            raise ValueError(f"budget.seconds must be positive or null, got {seconds}")
        if steps is not None and steps <= 0:
            raise ValueError(f"budget.steps must be positive or null, got {steps}")
        if reserve_seconds < 0 or (seconds is not None and reserve_seconds >= seconds):
            raise ValueError(
                f"budget.reserve_seconds={reserve_seconds} must be at least 0 and less than "
                f"budget.seconds={seconds}"
            )
        if not 0 <= warmup_steps <= 1000:
            raise ValueError(f"budget.warmup_steps must be from 0 to 1000, got {warmup_steps}")
        if not 0 < step_scale <= 1000:
            raise ValueError(
                f"budget.step_scale must be above 0 and at most 1000, got {step_scale}"
            )
        self.seconds = seconds
        self.steps = steps
        self.reserve_seconds = reserve_seconds
        self.warmup_steps = warmup_steps
        self.step_scale = step_scale
        self.variants: list[Variant] = []
        """Contexts in which the compiled step differs later in the run; filled by callbacks before
        training begins, and primed with the warm-up."""
        self.graphs_compiled = 0
        """Graphs that torch.compile made while the clock ran."""
        self._graphs_before = 0
        self.phases = PhaseTimer()
        self.elapsed = 0.0
        self.stop_signal = 0
        """Number of the signal that ends the run after this step, on all ranks; 0 for none."""
        self.warmdown_start_step: int | None = None
        self.mile_end_step: int | None = None
        """First step whose loss was plain cross-entropy because MiLe's gamma had fallen to 0."""
        self._control_group: torch.distributed.ProcessGroup | None = None
        self._step_events: list[torch.cuda.Event] = []
        self.running = False
        self.progress: Progress | None = None
        """Where the run stands; None before setup."""

    @property
    def training_seconds(self) -> float | None:
        """Seconds that training steps may use: the budget without the reserve."""
        return None if self.seconds is None else self.seconds - self.reserve_seconds

    @property
    def fraction(self) -> float:
        """Share of the budget that is used, from 0 to 1."""
        assert self.progress is not None, "the budget was not set up"
        return self.progress.fraction

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when fit begins: check the limits and open the ranks' control channel."""
        if stage != "fit":
            return
        limit = "budget.steps"
        if self.steps is None and trainer.max_steps > 0:
            self.steps, limit = trainer.max_steps, "trainer.max_steps"
        if self.seconds is None and self.steps is None:
            raise ValueError("budget.seconds is null, so budget.steps must say how long to train")
        if self.seconds is not None and self.steps is not None:
            rank_zero_warn(
                f"budget.seconds={self.seconds} and {limit}={self.steps} are both set: schedules "
                f"follow the seconds, so a run that {limit} ends early is not warmed down; set "
                "budget.seconds to null to let them follow the steps"
            )
        pl_module.schedule = pl_module.schedule_config.scaled(self.step_scale)
        if trainer.world_size > 1 and self._control_group is None:
            self._control_group = torch.distributed.new_group(
                backend="gloo", timeout=getattr(trainer.strategy, "_timeout", None)
            )
        self.progress = self._progress(trainer.global_step)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: warm up if there is budget left, then start the clock."""
        self._update(trainer)
        if self.warmup_steps > 0 and not trainer.should_stop:
            with self.phases.measure("compile and warm-up"):
                warm_up(trainer, pl_module, self.warmup_steps, self.variants)
        _synchronize(pl_module)
        self.phases.start("train", counts=True)
        self.running = True
        self._graphs_before = compiled_graphs()
        self._update(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before a micro-batch: the first of each step sets what follows the budget."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            pl_module.apply_progress(self.progress)
            if pl_module.lr_scale < 1 and self.warmdown_start_step is None:
                self.warmdown_start_step = trainer.global_step
            if pl_module.mile_has_ended and self.mile_end_step is None:
                self.mile_end_step = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Called after a micro-batch: the last of each step reads the clock."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._keep_host_near_device(pl_module.device)
            self._update(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation begins: the clock stands still."""
        if self.running:
            self.pause("validation", pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation ends: the clock goes on."""
        if self.running:
            self.resume("validation", pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: stop the clock for good."""
        _synchronize(pl_module)
        self.phases.stop("train")
        self.running = False
        self._step_events.clear()
        self._count_graphs()
        if self.graphs_compiled and self.warmup_steps:
            rank_zero_warn(
                f"{self.graphs_compiled} graphs were compiled while the training clock ran: the "
                "warm-up has not seen them, so the budget paid for them"
            )
        self._agree(trainer, self.phases.seconds("train"))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the time used so far, and what happened in it."""
        return {
            "phases": self.phases.state_dict(),
            "warmdown_start_step": self.warmdown_start_step,
            "mile_end_step": self.mile_end_step,
            "graphs_compiled": self.graphs_compiled,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the time that is left."""
        self.phases.load_state_dict(state_dict["phases"])
        self.warmdown_start_step = state_dict["warmdown_start_step"]
        self.mile_end_step = state_dict["mile_end_step"]
        self.graphs_compiled = state_dict.get("graphs_compiled", 0)

    def pause(self, phase: str, pl_module: pl.LightningModule) -> None:
        """Stop counting; what follows is booked under ``phase``."""
        _synchronize(pl_module)
        self._count_graphs()
        self.phases.start(phase)

    def resume(self, phase: str, pl_module: pl.LightningModule) -> None:
        """Count again."""
        _synchronize(pl_module)
        self.phases.stop(phase)
        self._step_events.clear()
        self._graphs_before = compiled_graphs()

    def agree_on_stop(self, trainer: pl.Trainer) -> int:
        """Ask all ranks whether one got a signal since the last step. All ranks call it."""
        self._agree(trainer, self.elapsed)
        return self.stop_signal

    def report(self) -> dict[str, Any]:
        """Return the limits, what was used of them, and the phases with their seconds.

        ``counted_seconds`` is the sum of the phases that count. ``within_budget`` allows it one
        mean step more than ``seconds``, as training ends with a whole step; None without seconds.
        """
        counted = sum(
            self.phases.seconds(name) for name, phase in self.phases.phases.items() if phase.counts
        )
        mean_step = self._mean_step_seconds(0 if self.progress is None else self.progress.step)
        return {
            "budget_seconds": self.seconds,
            "reserve_seconds": self.reserve_seconds,
            "budget_steps": self.steps,
            "step_scale": self.step_scale,
            "graphs_compiled": self.graphs_compiled,
            "counted_seconds": round(counted, 3),
            "within_budget": (
                None if self.seconds is None else counted <= self.seconds + mean_step
            ),
            "phases": {
                name: {"seconds": round(phase.seconds, 3), "counts": phase.counts}
                for name, phase in self.phases.phases.items()
            },
        }

    def _progress(self, step: int) -> Progress:
        return Progress(
            step=step,
            elapsed_seconds=self.elapsed,
            budget_seconds=self.training_seconds,
            max_steps=self.steps,
        )

    def _count_graphs(self) -> None:
        now = compiled_graphs()
        self.graphs_compiled += now - self._graphs_before
        self._graphs_before = now

    def _update(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        self._agree(trainer, self.phases.seconds("train") + self._seconds_in_flight(step))
        self.progress = self._progress(step)
        out_of_time = self.seconds is not None and self.elapsed >= self.training_seconds
        if out_of_time or (self.steps is not None and step >= self.steps):
            trainer.should_stop = True

    def _agree(self, trainer: pl.Trainer, elapsed: float) -> None:
        """Take rank 0's clock, and the signal that any rank got, in one exchange on the CPU."""
        signum = requested_signal(trainer)
        if self._control_group is not None:
            clock = elapsed if trainer.is_global_zero else -math.inf
            shared = torch.tensor([clock, signum], dtype=torch.float64)
            torch.distributed.all_reduce(
                shared, torch.distributed.ReduceOp.MAX, group=self._control_group
            )
            elapsed, signum = shared[0].item(), int(shared[1])
        self.elapsed, self.stop_signal = elapsed, signum

    def _keep_host_near_device(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._step_events.append(event)
        if len(self._step_events) > 2:
            self._step_events.pop(0)
        if len(self._step_events) == 2:
            self._step_events[0].synchronize()

    def _seconds_in_flight(self, step: int) -> float:
        # The last step is still running on the device: it will take about as long as the mean step.
        if not self._step_events or self._step_events[-1].query():
            return 0.0
        return self._mean_step_seconds(step)

    def _mean_step_seconds(self, step: int) -> float:
        return self.phases.seconds("train") / max(step, 1)


def _synchronize(pl_module: pl.LightningModule) -> None:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
