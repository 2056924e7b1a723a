"""The example in a callback's docstring runs as it stands."""

import inspect
import re
import textwrap

import pytest
from lightning.pytorch.callbacks import Callback

import callbacks
from pgl.cli import CALLBACKS, TRAINER_DEFAULTS
from pgl.data import TokenDataModule
from pgl.module import GolfModule
from pgl.trainer import GolfTrainer

ORDER = list(CALLBACKS.values())
SHOWN = [kind for kind in ORDER if "Trainer(" in inspect.getdoc(kind)]


def filled_in(given: list[Callback]) -> list[Callback]:
    """Put the callbacks that come before those of the example in place of its first "..."."""
    shown = [callback for callback in given if callback is not ...]
    if given[0] is not ...:
        return shown
    return [*(kind() for kind in ORDER[: ORDER.index(type(shown[0]))]), *shown]


def test_nearly_every_callback_shows_an_example():
    assert set(ORDER) - set(SHOWN) == {callbacks.WeightAveraging}  # without a Trainer


@pytest.mark.parametrize("kind", SHOWN)
def test_the_example_runs(kind, tiny_gpt, tiny_corpus, tmp_path, monkeypatch):
    trainers = []

    def trainer(callbacks, strategy="auto", **settings):
        defaults = {**TRAINER_DEFAULTS, "logger": False, "max_steps": 1, "accelerator": "cpu"}
        trainers.append(GolfTrainer(callbacks=filled_in(callbacks), **{**defaults, **settings}))
        return trainers[-1]

    monkeypatch.chdir(tmp_path)
    example = re.search(r"Example::\n\n((?:    .+\n?|\n)+)", inspect.getdoc(kind))[1]
    exec(textwrap.dedent(example), {**vars(callbacks), "Trainer": trainer})
    data = TokenDataModule(
        tiny_corpus, seq_len=64, batch_tokens=256, spans_per_batch=2, max_val_tokens=400
    )
    trainers[0].fit(GolfModule(tiny_gpt), datamodule=data)
    assert trainers[0].global_step == 1
