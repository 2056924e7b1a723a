from pathlib import Path

import pytest

from pgl.ablation import plan_trials
from pgl.ablation.trials import resolve

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PR236 = ["--config", str(CONFIGS / "pr236.yaml")]


def test_the_unchanged_recipe_comes_first():
    trials = plan_trials(PR236, ["swa"], [("lr", "--model.optimizer.matrix_lr=0.03")])
    assert [trial.name for trial in trials] == ["unchanged", "no_swa", "lr"]
    assert trials[0].options == ()
    assert trials[0].changes == {}
    assert trials[1].changes == {"averaging.swa": None, "averaging.source": "raw"}
    assert trials[2].options == ("--model.optimizer.matrix_lr=0.03",)
    assert trials[2].changes == {"model.optimizer.matrix_lr": 0.03}


def test_all_stands_for_every_technique_of_the_recipe(monkeypatch):
    from pgl.ablation import trials as module

    few = {name: module.SWITCHES[name] for name in ("xsa", "swa", "smear_gate", "mile")}
    monkeypatch.setattr(module, "SWITCHES", few)
    assert [trial.name for trial in plan_trials(PR236, ["all"])] == [
        "unchanged",
        "no_swa",
        "no_smear_gate",
    ]


@pytest.mark.parametrize(
    ("off", "free", "message"),
    [
        (["xsa"], [], "--off xsa: the recipe does not have it on"),
        (["nothing"], [], "--off nothing: unknown"),
        (["all", "swa"], [], "--off all stands for every technique"),
        (["swa", "swa"], [], "trial no_swa is there twice"),
        ([], [("same", "--model.optimizer.matrix_lr 0.025")], "changes nothing of the recipe"),
        ([], [("bad", "--model.optimizer.matrix_lrr 1")], "trial bad: unrecognized arguments"),
        ([], [("bad", "--model.optimizer.beta1 many")], "trial bad: .*beta1"),
        ([], [("bad", "'")], "trial bad: its options cannot be read"),
        ([], [("a/b", "--model.gpt.ln_scale true")], "becomes a folder"),
    ],
)
def test_a_trial_that_makes_no_sense_is_refused_at_once(off, free, message):
    with pytest.raises(ValueError, match=message):
        plan_trials(PR236, off, free)


def test_a_recipe_that_cannot_be_parsed_is_refused_in_the_words_of_fit():
    with pytest.raises(ValueError, match="the recipe: "):
        resolve(["--config", "absent.yaml"], "the recipe")
