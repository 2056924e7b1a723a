"""Warm-up and the late switch on a GPU: bit for bit no trace, and no graph inside the budget."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import QuantizationAwareTraining, WallClockBudget
from pgl.module import GolfModule
from pgl.optim import ScheduleConfig
from pgl.quant import FakeQuantConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class AtTheStart(Callback):
    """Keeps what training begins with, behind the warm-up."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step or batch_idx:
            return
        self.state = {
            "weights": {n: p.detach().clone() for n, p in pl_module.named_parameters()},
            "optimizer": {
                f"{i}/{n}": t.clone()
                for i, state in trainer.optimizers[0].state_dict()["state"].items()
                for n, t in state.items()
            },
            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state()},
            "batch": {"tokens": batch.clone()},
        }


def fit(golf_run, tiny_gpt, folder, warmup_steps):
    torch.manual_seed(0)
    module = GolfModule(tiny_gpt, schedule=ScheduleConfig(warmdown_steps=6), compile=True)
    start = AtTheStart()
    run = golf_run(
        folder,
        module=module,
        budget=WallClockBudget(seconds=None, steps=6, warmup_steps=warmup_steps),
        qat=QuantizationAwareTraining("late", 0.5, FakeQuantConfig()),
        extra=(start,),
        accelerator="gpu",
        precision="bf16-mixed",
    )
    return run, start.state


def test_warm_up_leaves_no_trace_and_compiles_all_variants(golf_run, tiny_gpt):
    warm, warm_start = fit(golf_run, tiny_gpt, "warm", 2)
    _, cold_start = fit(golf_run, tiny_gpt, "cold", 0)
    torch.testing.assert_close(warm_start, cold_start, rtol=0, atol=0)
    assert warm.callback(WallClockBudget).graphs_compiled == 0
    assert warm.callback(QuantizationAwareTraining).first_step == 4
