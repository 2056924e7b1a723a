"""When validation happens, which windows it reads, and that its scores are the naive ones."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import GPTQExport, SlidingWindowBPB, WallClockBudget
from pgl.module import GolfModule


class Validations(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.bpb: list[float] = []

    def on_validation_end(self, trainer, pl_module):
        self.steps.append(trainer.global_step)
        self.bpb.append(float(pl_module.last_score["bpb"]))


def naive(gpt, data, starts):
    """Score each target from the first of the given windows that holds it."""
    tokens = torch.from_numpy(data.val_tokens.astype("int64"))
    scored: dict[int, float] = {}
    for start in starts:
        window = tokens[start : start + data.seq_len + 1]
        with torch.no_grad():
            nats = gpt.token_losses(window[None, :-1], window[None, 1:])[0]
        for offset, value in enumerate(nats.tolist()):
            scored.setdefault(start + offset, value)
    assert sorted(scored) == list(range(len(tokens) - 1))
    num_bytes = int(data.byte_table.target_bytes(tokens[:-1], tokens[1:]).sum())
    return sum(scored.values()) / math.log(2) / num_bytes


def test_steps_and_scores(golf_run, monkeypatch):
    validations, scored = Validations(), []
    score = SlidingWindowBPB._score

    def counted(self, trainer, pl_module, weights, name, loader, sliding=False):
        scored.append(name)
        score(self, trainer, pl_module, weights, name, loader, sliding)

    monkeypatch.setattr(SlidingWindowBPB, "_score", counted)
    run = golf_run(
        budget=WallClockBudget(seconds=None, steps=5, warmup_steps=0),
        validation=SlidingWindowBPB(stride_tokens=8, every_n_steps=2),
        extra=(validations,),
    )
    # Optimizer steps, not micro-batches; the last one is Lightning's at the end of training.
    assert validations.steps == [2, 4, 5]
    assert scored == ["ema", "quantised", "quantised"]  # raw is known from the last validation
    scores = {(s.weights, s.windows): s.bpb for s in run.callback(SlidingWindowBPB).scores}
    assert scores["raw", "chunked"] == validations.bpb[-1]

    data, module = run.data, run.module.eval()
    chunks = [*range(0, 399 - 32, 32), 399 - 32]
    sliding = [*range(0, 399 - 32, 8), 399 - 32]
    assert scores["raw", "chunked"] == pytest.approx(naive(module.gpt, data, chunks), rel=1e-6)
    with module.with_weights(run.callback(GPTQExport).exported.state_dict):
        quantised = [naive(module.gpt, data, starts) for starts in (chunks, sliding)]
    assert scores["quantised", "chunked"] == pytest.approx(quantised[0], rel=1e-6)
    assert scores["quantised", "sliding"] == pytest.approx(quantised[1], rel=1e-6)


def test_validate_reads_sliding_windows_and_fit_reads_chunks(tiny_data):
    tiny_data.prepare_data()
    tiny_data.setup("fit")
    trainer = SimpleNamespace(
        datamodule=tiny_data, check_val_every_n_epoch=1, val_check_interval=1.0
    )
    SlidingWindowBPB(stride_tokens=16, seq_len=24, batch_windows=3).setup(trainer, None, "validate")
    loader = tiny_data.val_dataloader()
    assert (loader.seq_len, loader.stride, loader.batch_windows) == (24, 16, 3)
    SlidingWindowBPB(stride_tokens=16, every_n_steps=3).setup(trainer, None, "fit")
    loader = tiny_data.val_dataloader()
    assert (loader.seq_len, loader.stride, loader.batch_windows) == (32, 32, 8)
    assert trainer.val_check_interval == 3 * tiny_data.layout.accumulate
    assert trainer.check_val_every_n_epoch is None


def test_the_tail_reaches_the_windows(tiny_data):
    tiny_data.prepare_data()
    tiny_data.setup("validate")
    trainer = SimpleNamespace(datamodule=tiny_data)
    counts = {
        tail: sum(
            int((batch.stop_scored_B - batch.first_scored_B).sum())
            for batch in SlidingWindowBPB(stride_tokens=16, tail=tail).sliding_loader(trainer)
        )
        for tail in ("exact", "pr324")
    }
    assert counts["exact"] == 399
    assert counts["pr324"] < 399


@pytest.mark.parametrize("name", ["stride_tokens", "seq_len", "batch_windows", "every_n_steps"])
def test_settings_must_be_positive(name):
    with pytest.raises(ValueError, match=f"validation.{name} must be positive"):
        SlidingWindowBPB(**{name: 0})


def test_a_stride_longer_than_the_window_is_refused(tiny_data, tiny_gpt):
    with pytest.raises(ValueError, match="stride_tokens=64 must not exceed"):
        SlidingWindowBPB(stride_tokens=64, seq_len=32)
    trainer = SimpleNamespace(datamodule=tiny_data)
    with pytest.raises(ValueError, match="stride_tokens=64 must not exceed the window of 32"):
        SlidingWindowBPB(stride_tokens=64).setup(trainer, GolfModule(tiny_gpt), "validate")
