"""What a checkpoint or an artifact may be combined with, and what wins."""

from dataclasses import replace

import pytest
import torch

from callbacks import SlidingWindowBPB, WallClockBudget
from pgl.artifact import load
from pgl.data import Text, TokenDataModule
from pgl.module import GolfModule
from pgl.optim import OptimizerConfig


@pytest.fixture
def two_steps(golf_run):
    return golf_run("two", budget=WallClockBudget(seconds=None, steps=2, warmup_steps=0))


def test_optimizer_settings_of_the_resumed_run_win(two_steps, golf_run, tiny_gpt):
    optimizer = OptimizerConfig(matrix_lr=0.01, muon_weight_decay=0.0, decay_order="after")
    resumed = golf_run(
        "more",
        module=GolfModule(tiny_gpt, optimizer=optimizer),
        ckpt_path=two_steps.folder / "last.ckpt",
        budget=WallClockBudget(seconds=None, steps=3, warmup_steps=0),
    )
    groups = {group["name"]: group for group in resumed.trainer.optimizers[0].param_groups}
    assert groups["matrix"]["initial_lr"] == 0.01
    assert groups["matrix"]["weight_decay"] == 0.0
    assert groups["matrix"]["decay_order"] == "after"
    assert groups["matrix"]["lr"] == pytest.approx(0.01 * resumed.module.lr_scale)


@pytest.mark.parametrize("key", ["kind", "name"])
def test_an_optimizer_with_other_groups_is_refused_when_resuming(two_steps, golf_run, key):
    checkpoint = torch.load(two_steps.folder / "last.ckpt", weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    groups[0][key] = {"kind": "muon", "name": "head"}[key]
    other = two_steps.folder / "other.ckpt"
    torch.save(checkpoint, other)
    with pytest.raises(ValueError, match="load it with the model and routing it was made with"):
        golf_run("more", ckpt_path=other)


def test_other_data_settings_are_refused_when_resuming(two_steps, golf_run, tiny_corpus):
    data = TokenDataModule(tiny_corpus, seq_len=32, batch_tokens=512, spans_per_batch=4)
    with pytest.raises(ValueError, match=r"data\.batch_tokens=256, this run has 512"):
        golf_run("more", data=data, ckpt_path=two_steps.folder / "last.ckpt")


@pytest.mark.parametrize("file", ["last.ckpt", "model.pgl"])
def test_another_tokenizer_of_the_same_size_is_refused(two_steps, golf_run, tmp_path, file):
    words = [
        "one",
        "other",
        "text",
        "with",
        "quite",
        "other",
        "words",
        "in",
        "it",
        "than",
        "before",
    ]
    for index in range(60):
        text = " ".join(words[(index * k) % len(words)] for k in range(200))
        (tmp_path / f"{index}.txt").write_text(text)
    source = Text([str(tmp_path)], str(tmp_path / "cache"), 320, val_fraction=0.2)
    other = golf_run("other", fit=False, data=TokenDataModule(source, seq_len=32, batch_tokens=256))
    with pytest.raises(ValueError, match="trained with the tokenizer"):
        other.trainer.validate(
            other.module, datamodule=other.data, ckpt_path=two_steps.folder / file, verbose=False
        )


def test_an_artifact_runs_where_its_training_kernel_does_not(golf_run, tiny_gpt):
    config = replace(tiny_gpt, attention_backend="math")
    run = golf_run(module=GolfModule(config), validation=SlidingWindowBPB(stride_tokens=32))
    again = golf_run("again", fit=False)
    again.trainer.validate(
        again.module, datamodule=again.data, ckpt_path=run.folder / "model.pgl", verbose=False
    )
    assert load(run.folder / "model.pgl").config.attention_backend == "auto"
