"""Compile and prime a training step before the clock starts, and leave no trace of it."""

import copy

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from pgl.optim import MuonAdamW


def warm_up(trainer: pl.Trainer, module: pl.LightningModule, steps: int) -> None:
    """Run whole training steps on made-up tokens, then restore the state exactly.

    Forward, backward, collectives and the optimizer all run as they will in training. Weights,
    buffers, optimizer state, gradients and random number generators are put back afterwards; the
    data loader is not touched, as the tokens are made up.

    Args:
        trainer: The Trainer, with its strategy set up.
        module: A :class:`pgl.module.GolfModule` attached to it.
        steps: Optimizer steps to run.
    """
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, MuonAdamW)
    saved_model = copy.deepcopy(module.state_dict())
    saved_optimizer = copy.deepcopy(optimizer.state_dict())
    layout = trainer.datamodule.layout
    shape = (layout.sequences, layout.seq_len + 1)
    with isolate_rng():
        for _ in range(steps):
            tokens = torch.randint(
                module.gpt_config.vocab_size, shape, dtype=torch.int32, device=module.device
            )
            with trainer.precision_plugin.train_step_context():
                loss = trainer.strategy.training_step(tokens, 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    module.load_state_dict(saved_model)
    optimizer.load_state_dict(saved_optimizer)
    module.step_losses.clear()
