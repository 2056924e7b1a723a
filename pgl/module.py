"""The LightningModule: it wires the model, loss, optimizer and metric; it computes nothing itself.

Shape suffixes: S sequences, T sequence length (T1 = T + 1 tokens: inputs and targets overlap).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

import pgl
from pgl.compiled import compiled_copy
from pgl.distributed import ParallelMuonStrategy
from pgl.evaluate import (
    BatchScores,
    BitsPerByte,
    ByteTable,
    CompiledScorer,
    RunningBPB,
    WindowBatch,
    score_batch,
)
from pgl.generate import GenerationConfig, generate
from pgl.model import GPT, GPTConfig
from pgl.objective import LossConfig, training_loss
from pgl.optim import (
    MuonAdamW,
    OptimizerConfig,
    Progress,
    ScheduleConfig,
    build_optimizer,
    lr_scale,
    mile_gamma,
    muon_momentum,
    parameter_groups,
)

CHECKPOINT_FORMAT = 1


def check_format(checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that a newer pgl wrote in another format.

    Raises:
        ValueError: Naming the version that wrote it, and the formats of both.
    """
    found = checkpoint.get("pgl_format", CHECKPOINT_FORMAT)
    if not isinstance(found, int) or found > CHECKPOINT_FORMAT:
        writer = str(checkpoint.get("pgl_version", "a newer version"))
        raise ValueError(
            f"the checkpoint was written by pgl {writer:.40} in format {found!s:.40}, this pgl "
            f"{pgl.__version__} reads up to format {CHECKPOINT_FORMAT}: upgrade pgl"
        )


class GolfModule(pl.LightningModule):
    """A GPT that trains with MuonAdamW and is scored in bits per byte.

    Example::

        module = GolfModule(GPTConfig(num_layers=4, model_dim=128, num_heads=4, num_kv_heads=2))
        Trainer(max_steps=100).fit(module, TokenDataModule(Stdlib(), seq_len=256))

    Args:
        gpt: The architecture.
        optimizer: Learning rates, momentum, decay and clipping.
        schedule: How learning rates and momentum follow the budget.
        loss: Cross-entropy, or MiLe's entropy-weighted form.
        compile: Whether training and scoring run through ``torch.compile`` (fullgraph).
    """

    def __init__(
        self,
        gpt: GPTConfig = GPTConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
        loss: LossConfig = LossConfig(),
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.gpt_config = gpt
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.schedule = schedule
        """What this run follows: the configured schedule, shortened where the budget says so."""
        self.loss_config = loss
        self.compile_model = compile
        self.gpt = GPT(gpt)
        self.bits_per_byte: BitsPerByte | None = None
        self.generation = GenerationConfig()
        self.step_losses: list[Tensor] = []
        self.lr_scale = 1.0
        self.mile_has_ended = False
        """Whether MiLe's gamma has fallen to 0 with the learning rate."""
        self.last_score: dict[str, Tensor] = {}
        """What the last validation scored: bpb, loss, tokens, bytes."""
        self.bpb_so_far = math.nan
        """This rank's bits per byte in the validation that is running, one batch late."""
        self.register_buffer("mile_gamma", torch.zeros(()), persistent=False)
        self._training_loss: Callable[..., Tensor] = training_loss
        self.score_batch: Callable[..., BatchScores] = score_batch
        """Scores a batch of windows; compiled where the module is."""

    @override
    def setup(self, stage: str) -> None:
        """Called on every process: take the data's byte table and compile."""
        self._check_kernels(stage)
        if stage == "fit" and self.trainer.precision == "64-true":
            raise ValueError(
                "trainer.precision 64-true would train float64 weights, which no artifact can "
                "store: set it to 32-true or bf16-mixed"
            )
        data = getattr(self.trainer, "datamodule", None)
        vocab_size = getattr(data, "vocab_size", self.gpt_config.vocab_size)
        if vocab_size != self.gpt_config.vocab_size:
            raise ValueError(
                f"model.gpt.vocab_size={self.gpt_config.vocab_size} but the data's tokenizer has "
                f"{vocab_size} tokens: set model.gpt.vocab_size to {vocab_size}"
            )
        bos_id = getattr(data, "bos_id", self.gpt_config.bos_id)
        if bos_id != self.gpt_config.bos_id:
            raise ValueError(
                f"model.gpt.bos_id={self.gpt_config.bos_id} but the data's tokenizer begins "
                f"documents with {bos_id}: set model.gpt.bos_id to {bos_id}"
            )
        table: ByteTable | None = getattr(data, "byte_table", None)
        if table is not None and stage != "predict":
            self.bits_per_byte = BitsPerByte(table)
            self._running_bpb = RunningBPB(self.bits_per_byte)
        # Every rank fills its buffers with the same values; DDP would broadcast them before each
        # forward pass, and gloo cannot broadcast the byte table's int16.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, [name for name, _ in self.named_buffers()]
        )
        # Before compilation: a backend that cannot run here is refused with a reason.
        self.gpt.prepare(self.trainer.strategy.root_device)
        if self.compile_model and self._training_loss is training_loss:
            self._training_loss = compiled_copy(training_loss)
            self.score_batch = CompiledScorer()

    @override
    def training_step(self, tokens_ST1: Tensor, batch_idx: int) -> Tensor:
        """Return the mean loss of one micro-batch."""
        # Contiguous, so that all micro-batches have the strides that the graph was compiled for.
        ids_ST, targets_ST = tokens_ST1[:, :-1].contiguous(), tokens_ST1[:, 1:].long()
        loss = self._training_loss(self.gpt, ids_ST, targets_ST, self.loss_config, self.mile_gamma)
        if self._trainer is None or batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.step_losses.clear()
        self.step_losses.append(loss.detach())
        return loss

    @override
    def validation_step(self, batch: WindowBatch, batch_idx: int) -> BatchScores:
        """Score one batch of windows; callbacks get the scores."""
        assert self.bits_per_byte is not None, "validation needs a TokenDataModule's byte table"
        scores = self.score_batch(self.gpt, batch)
        self.bits_per_byte.update(*scores)
        self.bpb_so_far = self._running_bpb.read()
        return scores

    @override
    def on_validation_epoch_end(self) -> None:
        """Called when every window was scored: log the bits per byte of all ranks together."""
        self._log_score("val")

    @override
    def test_step(self, batch: WindowBatch, batch_idx: int) -> BatchScores:
        """Score one batch of windows."""
        return self.validation_step(batch, batch_idx)

    @override
    def on_test_epoch_end(self) -> None:
        """Called when every window was scored."""
        self._log_score("test")

    @override
    def predict_step(self, prompt_T: Tensor, batch_idx: int) -> str:
        """Return a prompt and its continuation as text."""
        data = self.trainer.datamodule
        ids_T = generate(self.gpt, prompt_T, self.generation, context_len=data.seq_len)
        return data.tokenizer.decode(ids_T.tolist())

    @override
    def configure_optimizers(self) -> MuonAdamW:
        """Build the one optimizer, with named Muon and AdamW groups."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return build_optimizer(
            self.gpt,
            self.optimizer_config,
            reduce_gradients=isinstance(strategy, ParallelMuonStrategy),
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called before a checkpoint is written: add what rebuilds this module, as plain values."""
        checkpoint["pgl_format"] = CHECKPOINT_FORMAT
        checkpoint["pgl_version"] = pgl.__version__
        checkpoint["hyper_parameters"] = {
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            **self.config(),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called before a checkpoint's state is restored."""
        check_format(checkpoint)
        if self._trainer is None:
            return
        if "pgl_artifact" in checkpoint:
            sha256 = checkpoint["pgl_artifact"].get("tokenizer_sha256")
            if sha256 is not None:
                self.trainer.datamodule.check_tokenizer(sha256)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._keep_own_settings(checkpoint)
            self._align_batch_progress(checkpoint)

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the GPT other weights inside the block, and its own ones back afterwards.

        Args:
            weights: All of the GPT's parameters by name, on any device.
        """
        own = dict(self.gpt.named_parameters())
        kept = {name: parameter.detach().clone() for name, parameter in own.items()}
        try:
            _copy_weights(own, weights)
            yield
        finally:
            _copy_weights(own, kept)

    def apply_progress(self, progress: Progress) -> None:
        """Set everything that follows the budget: learning rates, momentum, MiLe's gamma.

        Args:
            progress: Where the run stands at the start of an optimizer step.
        """
        self.lr_scale = lr_scale(progress, self.schedule)
        momentum = muon_momentum(progress, self.schedule)
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, MuonAdamW)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_scale
            if group["kind"] == "muon":
                group["momentum"] = momentum
        if self.loss_config.mile_gamma > 0:
            gamma = mile_gamma(self.lr_scale, self.loss_config.mile_gamma)
            self.mile_gamma.fill_(gamma)
            self.mile_has_ended = gamma == 0

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        return {
            "gpt": asdict(self.gpt_config),
            "optimizer": asdict(self.optimizer_config),
            "schedule": asdict(self.schedule_config),
            "loss": asdict(self.loss_config),
            "compile": self.compile_model,
        }

    def _check_kernels(self, stage: str) -> None:
        gpt = self.gpt_config
        if gpt.attention_backend != "fa4" and gpt.kernels != "quack":
            return
        precision = self.trainer.precision
        if gpt.attention_backend == "fa4" and "16" not in precision:
            raise ValueError(
                f"model.gpt.attention_backend fa4 computes in 16 bits, but trainer.precision is "
                f"{precision}: set it to bf16-mixed, or the backend to auto"
            )
        if gpt.kernels == "quack" and "bf16" not in precision:
            raise ValueError(
                f"model.gpt.kernels quack computes in bfloat16, but trainer.precision is "
                f"{precision}: set it to bf16-mixed, or the kernels to auto"
            )
        if gpt.kernels == "quack" and not self.compile_model:
            raise ValueError(
                "model.gpt.kernels quack runs in compiled models only: set model.compile to true, "
                "or the kernels to auto"
            )
        rows = getattr(getattr(self.trainer, "datamodule", None), "micro_batch_tokens", 0)
        if gpt.kernels == "quack" and stage == "fit" and rows % 128:
            raise ValueError(
                f"model.gpt.kernels quack needs data.micro_batch_tokens to be a multiple of 128, "
                f"not {rows}; or set the kernels to auto"
            )

    def _log_score(self, split: str) -> None:
        assert self.bits_per_byte is not None
        score = self.last_score = self.bits_per_byte.compute()
        self.bits_per_byte.reset()
        self._running_bpb = RunningBPB(self.bits_per_byte)
        # The metric has already summed over the ranks: they all log the same value, and its mean.
        self.log(f"{split}/bpb", score["bpb"], prog_bar=True, sync_dist=True)
        self.log(f"{split}/loss", score["loss"], sync_dist=True)

    def _keep_own_settings(self, checkpoint: dict[str, Any]) -> None:
        # torch restores learning rates and decay with the optimizer's state; what this run was
        # configured with wins, as for every other setting.
        own_groups = parameter_groups(self.gpt.named_parameters(), self.optimizer_config)
        [optimizer] = checkpoint["optimizer_states"]
        for saved, own in zip(optimizer["param_groups"], own_groups, strict=False):
            # What the groups are stays as it was saved: the optimizer refuses those of another.
            settings = {k: v for k, v in own.items() if k not in ("params", "kind", "name")}
            saved.update(settings, initial_lr=own["lr"])

    def _align_batch_progress(self, checkpoint: dict[str, Any]) -> None:
        # Lightning counts micro-batches. Another world size has other micro-batches, and a step
        # that was cut short starts again, so the count is derived from the optimizer steps.
        loops = checkpoint["loops"]["fit_loop"]
        micro_batches = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for counts in ("total", "current"):
            progress = loops["epoch_loop.batch_progress"][counts]
            # Saved by a hook of the last micro-batch, or after it: Lightning tells them apart.
            in_hook = progress["completed"] < progress["processed"]
            for event in ("ready", "started", "processed", "completed"):
                progress[event] = micro_batches
            progress["completed"] -= in_hook


@torch.no_grad()
def _copy_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
