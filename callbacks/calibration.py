"""What GPTQ is calibrated on: training tokens, or text that the model writes itself."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from callbacks.progress import track
from pgl.generate import generate_batch
from pgl.quant import (
    Calibration,
    average_over_ranks,
    collect_hessians,
    collect_output_energies,
)

T = TypeVar("T")
CalibrationSource = Literal["training", "samples", "training_after_budget"]

SAMPLE_TEMPERATURE = 0.8
SAMPLE_SEED = 1337
SAMPLE_BATCH_SEQUENCES = 64
BACKWARD_SEQUENCES = 8  # a pass keeps the activations of all layers


@dataclass(frozen=True)
class CalibrationText:
    """Text that a calibration has read, as it was read."""

    read: Literal["training tokens", "samples"]
    """Tokens of the training shards, or text that the model wrote."""
    tokens_BT1: Tensor
    """This rank's sequences and the token after each, (sequences, T + 1) ids."""


def counts_as_training(source: CalibrationSource) -> bool:
    """Tell whether the time that calibration takes is part of the training budget."""
    return source == "training"


def record_legal(source: CalibrationSource) -> bool:
    """Tell whether the challenge allows it: training tokens are not to be read after the budget."""
    return source != "training_after_budget"


def sampling_tokens(num_sequences: int, length: int) -> int:
    """Return the tokens of forward pass that writing samples takes: each reads all before it."""
    return num_sequences * length * (length + 1) // 2


def calibrate(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    weights: Mapping[str, Tensor],
    source: CalibrationSource,
    num_sequences: int,
    with_energies: bool,
) -> tuple[Calibration, CalibrationText]:
    """Return what the sequences say about each linear layer, the same on all ranks, and them.

    The ranks share the sequences out. Neither kind of calibration touches the validation tokens.

    Args:
        trainer: Its data module has the training tokens.
        pl_module: The module whose GPT is run.
        weights: The GPT's weights during calibration.
        source: Where the sequences come from: the first training sequences, or
            ``num_sequences`` samples at temperature 0.8 and a fixed seed.
        num_sequences: Sequences of ``data.seq_len`` tokens over all ranks.
        with_energies: Whether to run backward too, for balanced steps.
    """
    data = trainer.datamodule
    layout = data.calibration_layout(num_sequences)
    with (
        pl_module.with_weights(weights),
        trainer.precision_plugin.val_step_context(),
    ):
        text = _sequences(trainer, pl_module, source, num_sequences)
        tokens_BT1 = text.tokens_BT1
        batches = tokens_BT1.split(layout.sequences)
        with track(trainer, "calibrate", len(batches)) as advance:
            hessians = collect_hessians(
                pl_module.gpt,
                _counted((batch[:, :-1] for batch in batches), advance),
                device=pl_module.device,
                forward=pl_module.gpt.features,
            )
        energies = {}
        if with_energies:
            backward = tokens_BT1.split(BACKWARD_SEQUENCES)
            with track(trainer, "balance", len(backward)) as advance:
                energies = collect_output_energies(
                    pl_module.gpt,
                    _counted(((b[:, :-1], b[:, 1:].long()) for b in backward), advance),
                    device=pl_module.device,
                    losses=pl_module.gpt.token_losses,
                )
    if trainer.world_size > 1:
        average_over_ranks(hessians)
        average_over_ranks(energies)
    return Calibration(hessians, energies), text


def _sequences(
    trainer: pl.Trainer, pl_module: pl.LightningModule, source: CalibrationSource, count: int
) -> CalibrationText:
    """Return this rank's sequences."""
    data = trainer.datamodule
    layout = data.calibration_layout(count)
    if source == "samples":
        return CalibrationText("samples", _sampled(trainer, pl_module, count))
    micro_batches = [
        layout.read_micro_batch(data.stream, 0, index).astype("int32")
        for index in range(layout.accumulate)
    ]
    return CalibrationText("training tokens", torch.from_numpy(np.concatenate(micro_batches)))


def _sampled(trainer: pl.Trainer, pl_module: pl.LightningModule, num_sequences: int) -> Tensor:
    """Return this rank's share of the sampled sequences, (sequences, T + 1) ids."""
    length = trainer.datamodule.seq_len
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    # The default type is the precision's: bfloat16 has few numbers in [0, 1).
    uniform_BT = torch.rand(num_sequences, length, generator=generator, dtype=torch.float32)
    own_BT = uniform_BT[trainer.global_rank :: trainer.world_size]
    num_batches = -(-len(own_BT) // SAMPLE_BATCH_SEQUENCES)
    was_training = pl_module.gpt.training
    pl_module.gpt.eval()
    try:
        with track(trainer, "sample", num_batches * length) as advance:
            ids_BT = generate_batch(
                pl_module.gpt, own_BT, SAMPLE_TEMPERATURE, SAMPLE_BATCH_SEQUENCES, advance
            )
    finally:
        pl_module.gpt.train(was_training)
    return ids_BT


def _counted(batches: Iterable[T], advance: Callable[[], None]) -> Iterator[T]:
    for batch in batches:
        yield batch
        advance()
