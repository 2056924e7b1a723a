"""The strategy of Parallel Muon: what it takes and what it refuses; runs are in distributed/."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import StrategyRegistry

from pgl.distributed import ParallelMuonStrategy
from pgl.optim import OptimizerConfig
from pgl.trainer import GolfTrainer


def test_it_is_known_by_its_name():
    assert isinstance(StrategyRegistry.get("parallel_muon"), ParallelMuonStrategy)
    trainer = GolfTrainer(strategy="parallel_muon", accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, ParallelMuonStrategy)
    assert trainer.world_size == 2


@pytest.mark.parametrize(
    "settings",
    [{"find_unused_parameters": True}, {"ddp_comm_hook": print}, {"model_averaging_period": 2}],
)
def test_it_refuses_settings_of_the_wrapper(settings):
    with pytest.raises(ValueError, match="no DDP wrapper"):
        ParallelMuonStrategy(**settings)


def test_it_takes_settings_of_processes():
    strategy = ParallelMuonStrategy(process_group_backend="gloo", start_method="spawn")
    assert strategy.process_group_backend == "gloo"


def test_it_refuses_a_clip_and_a_scaler_that_act_too_early():
    trainer = GolfTrainer(accelerator="cpu", devices=1, logger=False, gradient_clip_val=1.0)
    with pytest.raises(ValueError, match=r"model\.optimizer\.grad_clip_norm"):
        ParallelMuonStrategy().setup(trainer)
    trainer.gradient_clip_val = None
    strategy = ParallelMuonStrategy()
    strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="use bf16-mixed"):
        strategy.setup(trainer)


def test_one_process_trains_as_without_it(golf_run):
    plain = golf_run("plain")
    parallel = golf_run("parallel", strategy="parallel_muon")
    assert parallel.trainer.global_step == plain.trainer.global_step == 6
    for (name, ours), theirs in zip(
        parallel.module.gpt.named_parameters(), plain.module.gpt.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_local_clipping_needs_a_norm():
    with pytest.raises(ValueError, match="grad_clip_norm must say"):
        OptimizerConfig(clip="local", grad_clip_norm=None)
    assert OptimizerConfig(clip="local").grad_clip_norm == 0.3
