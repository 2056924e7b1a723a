"""Several processes that agree at start and end, and of which none waits for a dead one."""

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from callbacks.divergence_guard import DivergenceGuard
from callbacks.find import optional_callback
from pgl.errors import RankError
from pgl.fingerprint import (
    Fingerprint,
    code_fingerprint,
    disagreement,
    files_fingerprint,
    settings_of,
    weights_fingerprint,
)
from pgl.heartbeat import Heartbeats

TRAINER_SETTINGS = ("precision", "max_steps", "log_every_n_steps", "val_check_interval")
OF_A_COLLECTIVE = ("gloo", "nccl", "connection", "timed out", "socket")


class RankWatch(Callback):
    """Refuses ranks that differ, and ends the run on all of them when one dies or hangs.

    When fit begins the ranks compare their settings, the lengths and both ends of their shards,
    and their code. From then on each shows a sign of life about twice a second, whatever its GPU
    does. A rank whose collective fails waits a few seconds to learn who is to blame; one that hangs
    in a collective with a dead rank ends after ``timeout_seconds``. The message names the rank.
    When training ends the ranks compare their weights: not a bit may differ. Averages are computed
    from them, by each rank alike, and not compared.

    A rank that lives but does not take part any more is a matter of the collectives' own time-out.

    Note:
        One process has nothing to watch and pays nothing. RunReport behind it says how the
        comparison ended.

    Example::

        Trainer(strategy="ddp", callbacks=[WallClockBudget(), RankWatch(timeout_seconds=60)])

    Args:
        timeout_seconds: Silence after which a rank counts as dead.
        collective_timeout_seconds: How long a rank waits for the others within one collective.
            Rank 0 alone packs the artifact meanwhile, so it must be longer than that. A
            ``timeout`` of the Trainer's strategy comes first.

    Raises:
        ValueError: If a time is not positive.
    """

    def __init__(
        self, timeout_seconds: float = 300.0, collective_timeout_seconds: float = 1800.0
    ) -> None:
        for name, seconds in (
            ("timeout_seconds", timeout_seconds),
            ("collective_timeout_seconds", collective_timeout_seconds),
        ):
            if seconds <= 0:
                raise ValueError(f"ranks.{name} must be positive, got {seconds}")
        self.timeout_seconds = timeout_seconds
        self.collective_timeout_seconds = collective_timeout_seconds
        self.heartbeats: Heartbeats | None = None
        self.error: RankError | None = None
        """Why a collective failed, once it has."""
        self.replicas: dict[str, Any] | None = None
        """Whether the ranks ended with the same weights; None with one process."""

    def report(self) -> dict[str, Any] | None:
        """Return the number of ranks and how their weights differ (null: not at all)."""
        return self.replicas

    def limit_collectives(self, strategy: Strategy) -> None:
        """Set the collectives' time-out, before the strategy makes its process group."""
        usual = DDPStrategy()._timeout
        if isinstance(strategy, DDPStrategy) and strategy._timeout == usual:
            strategy._timeout = timedelta(seconds=self.collective_timeout_seconds)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when fit begins and the data is open: compare the ranks, start to watch."""
        if stage != "fit" or trainer.world_size == 1:
            return
        fingerprints: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(fingerprints, _fingerprint(trainer, pl_module))
        different = disagreement(fingerprints)
        if different is not None:
            raise RankError(
                f"the processes of this run differ in {different}: start all of them with the same "
                "settings, data and code"
            )
        self._start(trainer)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Called after a micro-batch: the others may know how far this rank is."""
        if self.heartbeats is not None:
            self.heartbeats.step = trainer.global_step

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: compare the replicas' weights, once no step is in flight."""
        if trainer.world_size == 1:
            return
        guard = optional_callback(trainer, DivergenceGuard)
        if guard is not None:
            guard.settle(trainer, pl_module)  # which may roll them back
        hashes: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(hashes, {"weights": weights_fingerprint(pl_module)})
        different = disagreement(hashes)
        self.replicas = {"ranks": trainer.world_size, "different": different}
        if different is not None:
            rank_zero_warn(
                f"the replicas have drifted apart, and rank 0's is exported: {different}"
            )

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Called when this rank fails: find out whether another one is to blame, or tell them."""
        if self.heartbeats is None:
            return
        reason = f"{type(exception).__name__}: {exception}"
        if _is_of_a_collective(exception):
            lost = self.heartbeats.explain()
            if lost is None:
                lost = f"all processes live, but one does not take part ({self.heartbeats.steps()})"
            self.error = RankError(f"rank {trainer.global_rank} waited for others in vain: {lost}")
            reason = str(self.error)
        self.heartbeats.fail(reason.splitlines()[0])
        self.heartbeats = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when the run ends well."""
        if self.heartbeats is not None:
            self.heartbeats.stop()
            self.heartbeats = None

    def _start(self, trainer: pl.Trainer) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DDPStrategy)
        host = strategy.cluster_environment.main_address
        place = (trainer.global_rank, trainer.world_size, self.timeout_seconds)
        if trainer.is_global_zero:
            self.heartbeats = Heartbeats(host, None, *place)
        port = strategy.broadcast(self.heartbeats and self.heartbeats.port)
        if self.heartbeats is None:
            self.heartbeats = Heartbeats(host, port, *place)
        strategy.barrier("RankWatch")
        self.heartbeats.start()


def _fingerprint(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Fingerprint]:
    data = trainer.datamodule
    config = {f"trainer.{name}": repr(getattr(trainer, name)) for name in TRAINER_SETTINGS}
    config |= {f"model.{name}": repr(value) for name, value in pl_module.config().items()}
    config |= settings_of(data, "data")
    for callback in trainer.callbacks:
        if type(callback).__module__.startswith("callbacks."):
            config |= settings_of(callback, type(callback).__name__)
    corpus = data.corpus
    files = [*corpus.train_shards, *corpus.val_shards, corpus.tokenizer_path]
    return {"config": config, "data": files_fingerprint(files), "code": code_fingerprint()}


def _is_of_a_collective(exception: BaseException) -> bool:
    text = str(exception).lower()
    return isinstance(exception, RuntimeError) and any(word in text for word in OF_A_COLLECTIVE)
