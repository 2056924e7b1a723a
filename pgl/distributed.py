"""How several processes train one model: Parallel Muon, as a Lightning strategy.

With Lightning's own ``ddp`` all gradients are averaged on all ranks during backward and the
optimizer shares out Newton-Schulz. Here nothing happens in backward: the optimizer averages the
gradients itself, each rank only those of its own matrices.
"""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from typing_extensions import override


class ParallelMuonStrategy(DDPStrategy):
    """Processes as DDP starts them, with gradients left to :class:`pgl.optim.MuonAdamW`.

    The model is not wrapped: ranks start with rank 0's weights, and an optimizer made with
    ``reduce_gradients=True`` reduce-scatters the gradients of matrices, all-reduces the others and
    gathers the updates (PR #399, used by PRs #549 and #703: about 83 against 85 ms a step on
    8 H100). Micro-batches that only accumulate communicate nothing.

    Example::

        Trainer(strategy="parallel_muon", devices=8)

    Args:
        settings: Settings of :class:`lightning.pytorch.strategies.DDPStrategy` about processes,
            such as ``process_group_backend``, ``timeout`` and ``start_method``.

    Raises:
        ValueError: A setting of the DDP wrapper, which does not exist here.
    """

    strategy_name = "parallel_muon"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        hooks = (self._ddp_comm_state, self._ddp_comm_hook, self._ddp_comm_wrapper)
        if self._ddp_kwargs or hooks != (None, None, None) or self._model_averaging_period:
            raise ValueError(
                "trainer.strategy parallel_muon has no DDP wrapper, so it takes none of its "
                "settings: leave them out, or use strategy ddp"
            )

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register(
            cls.strategy_name, cls, description="MuonAdamW reduces the gradients itself"
        )

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Called when a run begins: refuse what acts on gradients before they are averaged."""
        if trainer.gradient_clip_val:
            raise ValueError(
                "trainer.gradient_clip_val would clip gradients that are not averaged yet: set "
                "model.optimizer.grad_clip_norm instead"
            )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "trainer.precision 16-mixed scales the loss of each device by itself, which "
                "strategy parallel_muon cannot average: use bf16-mixed"
            )
        super().setup(trainer)

    @override
    @torch.no_grad()
    def configure_ddp(self) -> None:
        """Give all ranks the weights of rank 0; their buffers hold the same values anyway."""
        assert self.model is not None
        for parameter in self.model.parameters():
            dist.broadcast(parameter.detach(), src=0)


ParallelMuonStrategy.register_strategies(StrategyRegistry)
