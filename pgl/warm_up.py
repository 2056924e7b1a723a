"""Compile and prime a training step before the clock starts, and leave no trace of it."""

import copy
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from pgl.evaluate.score import evaluation_mode, move
from pgl.optim import MuonAdamW

Variant = Callable[[], AbstractContextManager[object]]
"""Makes a context in which the module computes as it will later in the run."""


def warm_up(
    trainer: pl.Trainer, module: pl.LightningModule, steps: int, variants: Iterable[Variant] = ()
) -> None:
    """Run whole training steps on made-up tokens, then restore the state exactly.

    Forward, backward, collectives and the optimizer all run as they will in training: as the module
    stands, then in each of the variants. If the run validates, one batch of each shape that
    validation has is scored too. Weights, buffers, optimizer state, gradients and random number
    generators are put back afterwards; the position in the training data is not touched, as the
    tokens are made up.

    Args:
        trainer: The Trainer, with its strategy set up.
        module: A :class:`pgl.module.GolfModule` attached to it.
        steps: Optimizer steps to run in each variant.
        variants: Contexts in which the compiled step differs, such as fake quantisation that
            starts late.
    """
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, MuonAdamW)
    # Not the state dict: it lacks the buffers that are not persistent.
    tensors = dict(chain(module.named_parameters(), module.named_buffers()))
    saved = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    saved_optimizer = copy.deepcopy(optimizer.state_dict())
    with isolate_rng():
        for variant in chain([nullcontext], variants):
            with variant():
                for _ in range(steps):
                    _train_once(trainer, module, optimizer)
        if trainer.enable_validation:
            _score_once(trainer, module)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    optimizer.load_state_dict(saved_optimizer)
    module.step_losses.clear()


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported unless something compiles
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]


def _train_once(
    trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
) -> None:
    layout = trainer.datamodule.layout
    tokens_ST1 = torch.randint(
        module.gpt_config.vocab_size,
        (layout.sequences, layout.seq_len + 1),
        dtype=torch.int32,
        device=module.device,
    )
    with trainer.precision_plugin.train_step_context():
        loss: Tensor = trainer.strategy.training_step(tokens_ST1, 0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _score_once(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Score one batch of each shape that validation has; the scores are dropped."""
    loader = trainer.datamodule.val_dataloader()
    seen = set()
    with evaluation_mode(module), trainer.precision_plugin.val_step_context():
        # Windows that come alone are in front; behind them all batches have one shape.
        for batch in islice(loader, loader.num_single_batches + 1):
            shape = (batch.tokens_BS1.shape, batch.last)
            if shape not in seen:
                module.score_batch(module.gpt, move(batch, module.device))
            seen.add(shape)
