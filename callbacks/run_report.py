"""What happened in a run, in one JSON and one Markdown file beside the artifact."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from callbacks.divergence_guard import DivergenceGuard
from callbacks.find import find_callback, optional_callback
from callbacks.gptq_export import GPTQExport
from callbacks.legality import legality
from callbacks.progress import print_lines
from callbacks.rank_watch import RankWatch
from callbacks.run_folder import run_folder
from callbacks.sliding_window_bpb import SlidingWindowBPB
from callbacks.techniques import techniques
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.io import atomic_write
from pgl.legality import final_score
from pgl.report import environment, quantisation_loss, summary, to_markdown


class RunReport(Callback):
    """Writes ``report.json`` and ``report.md`` into the run's folder, and prints the result.

    The report holds the score at each stage, the phases with their times and which of them count,
    steps and tokens, the size table, versions, the git revision, hashes of shards and tokenizer,
    and for each technique whether it acted and when. TensorBoard's hparams tab gets the score.

    Note:
        It belongs behind all callbacks that it reports on.

    Example::

        Trainer(callbacks=[..., RunReport()])
    """

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: say what the format of Muon's momentum saves."""
        optimizer = pl_module.optimizers(use_pl_optimizer=False)
        if optimizer.momentum_format != "float32":
            taken, saved = optimizer.momentum_bytes(), optimizer.momentum_bytes_saved()
            where = " on rank 0" if trainer.world_size > 1 else ""
            print_lines(
                trainer,
                f"{optimizer.momentum_format} momentum takes {taken / 1e6:.2f} MB{where} and saves "
                f"{saved / 1e6:.2f} MB against float32",
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends, after export and scoring."""
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        report = self.collect(trainer, pl_module, folder)
        with atomic_write(folder / "report.json") as file:
            file.write(json.dumps(report, indent=2).encode())
        with atomic_write(folder / "report.md") as file:
            file.write(to_markdown(report).encode())
        self._log_hparams(trainer, pl_module, report)
        print_lines(trainer, f"{summary(report)}\n  files      {folder}")

    def collect(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path
    ) -> dict[str, Any]:
        """Return the report as plain values."""
        budget = find_callback(trainer, WallClockBudget)
        data = trainer.datamodule
        described = data.describe()
        machine = environment(trainer.strategy.root_device.type, trainer.world_size)
        tokens = trainer.global_step * data.batch_tokens
        guard = optional_callback(trainer, DivergenceGuard)
        ranks = optional_callback(trainer, RankWatch)
        return {
            "name": folder.name if not folder.name.startswith("version_") else folder.parent.name,
            "training": {
                "steps": trainer.global_step,
                "batch_tokens": data.batch_tokens,
                "micro_batch_tokens": data.micro_batch_tokens,
                "accumulate": data.layout.accumulate,
                "tokens": tokens,
                "seconds": round(budget.elapsed, 3),
                "tokens_per_second": round(tokens / max(budget.elapsed, 1e-9)),
                "devices": trainer.world_size,
                "precision": str(trainer.precision),
                "parameters": sum(p.numel() for p in pl_module.gpt.parameters()),
            },
            "scores": find_callback(trainer, SlidingWindowBPB).report(),
            "budget": budget.report(),
            "artifact": find_callback(trainer, GPTQExport).report(),
            "quantisation": quantisation_loss(
                find_callback(trainer, SlidingWindowBPB).report(),
                find_callback(trainer, WeightAveraging).source,
            ),
            "averaging": find_callback(trainer, WeightAveraging).report(),
            "divergence": None if guard is None else guard.report(),
            "replicas": None if ranks is None else ranks.report(),
            "techniques": techniques(trainer, pl_module),
            "legality": legality(trainer, described, tokens, machine["device"]),
            "data": described,
            "environment": machine,
            "model": pl_module.config(),
        }

    def _log_hparams(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: dict[str, Any]
    ) -> None:
        final = final_score(report["scores"])
        if not isinstance(trainer.logger, TensorBoardLogger) or final is None:
            return
        config = {"batch_tokens": trainer.datamodule.batch_tokens, **pl_module.config()}
        trainer.logger.log_hyperparams(config, {"final/bpb": final["bpb"]})
