"""The same seed on the same machine is the same run on the CPU, bit for bit."""

import json

import torch
from lightning.pytorch.callbacks import Callback

from callbacks import WallClockBudget, WeightAveraging
from pgl.module import GolfModule


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def once(golf_run, tiny_gpt, folder: str, seed: int, warmup_steps: int = 0):
    losses = Losses()
    torch.manual_seed(seed)
    run = golf_run(
        folder,
        module=GolfModule(tiny_gpt),
        budget=WallClockBudget(seconds=None, steps=6, warmup_steps=warmup_steps),
        extra=(losses,),
    )
    report = json.loads((run.folder / "report.json").read_text())
    weights = run.callback(WeightAveraging).source_weights(run.module)
    scores = [score["bpb"] for score in report["scores"]]
    return losses.values, scores, torch.cat([w.flatten() for w in weights.values()])


def test_the_same_seed_is_the_same_run(golf_run, tiny_gpt):
    losses, scores, weights = once(golf_run, tiny_gpt, "first", seed=1)
    again = once(golf_run, tiny_gpt, "again", seed=1, warmup_steps=2)
    assert len(losses) == 24
    assert again[0] == losses
    assert again[1] == scores
    assert torch.equal(again[2], weights)


def test_another_seed_is_another_run(golf_run, tiny_gpt):
    losses, _, _ = once(golf_run, tiny_gpt, "first", seed=1)
    assert once(golf_run, tiny_gpt, "again", seed=2)[0] != losses
