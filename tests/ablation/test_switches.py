"""Each name of `--off` acts on a recipe that has the technique; one that has not refuses it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from callbacks.techniques import techniques
from pgl.ablation.switches import SWITCHES, switch
from pgl.ablation.trials import off_options, resolve
from pgl.model import GPTConfig
from pgl.module import GolfModule
from pgl.objective import LossConfig
from pgl.optim import OptimizerConfig, ScheduleConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

CHECKED = {
    "model.gpt": GPTConfig,
    "model.optimizer": OptimizerConfig,
    "model.schedule": ScheduleConfig,
    "model.loss": LossConfig,
}

# Settings that switch on what no recipe has, or what a recipe needs beside it.
TURN_ON = {
    "smear_document_reset": {"model.gpt.smear_document_reset": True},
    "resid_mix_phase": {"model.gpt.resid_mix_init": "phase"},
    "value_residual": {"model.gpt.value_residual": True},
    "gated_attention": {"model.gpt.gated_attention": True},
    "document_mask": {"model.gpt.document_mask": True},
    "scaled_output_init": {"model.gpt.output_proj_init": "scaled"},
    "polar_express": {"model.optimizer.ns_coefficients": "polar_express"},
    "local_clip": {"model.optimizer.clip": "local"},
    "momentum_format": {"model.optimizer.momentum_format": "int8"},
    "cosine_warmdown": {"model.schedule.warmdown_shape": "cosine"},
    "warmdown_cap": {"model.schedule.warmdown_max_fraction": 0.5},
    "qat": {"qat.start": "late"},
    "swa": {"averaging.swa": {"every_steps": 5}},
    "last": {"averaging.last": {"every_steps": 5, "keep": 2}},
    "balanced_steps": {"artifact.quant.gptq.steps": "balanced"},
    "size_search": {"artifact.search": "step"},
    "pruning": {"artifact.quant.prune_fraction": 0.05},
    "long_context_scoring": {"validation.seq_len": 4096},
    "ttt": {"ttt.method": "score_first"},
    "parallel_muon": {"trainer.strategy": "parallel_muon"},
}


def as_options(settings):
    options = []
    for key, value in settings.items():
        options += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return options


@pytest.fixture(scope="module")
def pr703():
    options = ["--config", str(CONFIGS / "pr703.yaml")]
    return options, resolve(options, "pr703")


@pytest.fixture(scope="module")
def bare():
    """The baseline with everything off that can be."""
    options = ["--config", str(CONFIGS / "baseline.yaml")]
    while True:
        recipe = resolve(options, "baseline")
        on = [name for name, each in SWITCHES.items() if each.is_on(recipe)]
        if not on:
            return recipe
        for name in on:
            options += off_options(name, recipe)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_the_parsed_configuration(name, pr703):
    options, recipe = pr703
    if name in TURN_ON:
        options = [*options, *as_options(TURN_ON[name])]
        recipe = resolve(options, "pr703 with it")
    assert SWITCHES[name].is_on(recipe)
    settings = SWITCHES[name].settings(recipe)
    off = resolve([*options, *off_options(name, recipe)], name)
    assert off != recipe
    for key, value in settings.items():
        assert off[key] == value
    # Nothing else changes: what it does not name stays as it was.
    changed = {key for key in {*recipe, *off} if recipe.get(key) != off.get(key)}
    assert all(any(key.startswith(named) for named in settings) for key in changed)
    assert not SWITCHES[name].is_on(off)
    # The parser does not check ranges and combinations: the classes do.
    for section, kind in CHECKED.items():
        kind(**{k.rpartition(".")[2]: v for k, v in off.items() if k.rpartition(".")[0] == section})


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_refused_where_the_technique_is_off(name, bare):
    with pytest.raises(ValueError, match=f"--off {name}: the recipe does not have it on") as caught:
        off_options(name, bare)
    assert "\n" not in str(caught.value)
    assert any(key in str(caught.value) for key in bare)


def test_cache_and_backout_leave_each_other_alone(pr703):
    _, recipe = pr703
    assert switch("cache").settings(recipe) == {"model.gpt.cache_attention": False}
    assert switch("backout").settings(recipe) == {"model.gpt.backout": False}
    alone = {**recipe, "model.gpt.backout": False}
    assert switch("cache").settings(alone) == {"model.gpt.cache_layer": None}
    alone = {**recipe, "model.gpt.cache_attention": False}
    both = {"model.gpt.backout": False, "model.gpt.cache_layer": None}
    assert switch("backout").settings(alone) == both


def test_without_its_average_a_run_exports_what_is_left(pr703):
    _, recipe = pr703
    assert switch("ema").settings(recipe) == {"averaging.ema": None, "averaging.source": "raw"}
    both = {key: value for key, value in recipe.items() if key != "averaging.swa"}
    both["averaging.swa.every_steps"] = 50
    assert switch("ema").settings(both) == {"averaging.ema": None, "averaging.source": "swa"}
    assert switch("swa").settings(both) == {"averaging.swa": None}
    scored = {**both, "averaging.score": ["ema", "swa"]}
    assert switch("swa").settings(scored)["averaging.score"] == ["ema"]


def test_an_unknown_technique_is_refused_with_the_names():
    with pytest.raises(ValueError, match="--off xas: unknown; choose from leaky_relu2, "):
        switch("xas")


def test_reports_name_techniques_as_the_registry_does(golf_run, tiny_gpt):
    config = replace(
        tiny_gpt,
        rope_train_len=16,
        mlp_activation="leaky_relu2",
        rope_dims=8,
        init="orthogonal",
        output_proj_init="scaled",
        smear_document_reset=True,
        value_embedding_layers=[1],
        value_residual=True,
        ln_scale=True,
        xsa_last_layers=1,
        gated_attention=True,
        cache_layer=0,
        backout=True,
        document_mask=True,
    )
    run = golf_run(module=GolfModule(config))
    rows = {row["technique"] for row in techniques(run.trainer, run.module)}
    known = {each.technique for each in SWITCHES.values()}
    assert rows <= known
    # Off in this run: they need settings of the optimizer, the export or the averaging.
    absent = {None, "fake quantisation", "GPTQ", "pruning", "Muon momentum format", "MiLe loss"}
    assert known - rows == absent | {"weight averaging: swa", "weight averaging: last"}
