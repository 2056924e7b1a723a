"""Fake quantisation acts in the compiled step, switches on time and costs the clock no graph."""

import functools
import json
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import (
    GPTQExport,
    QuantizationAwareTraining,
    RunCheckpoint,
    WallClockBudget,
)
from pgl.cli import main
from pgl.model import GPT
from pgl.model.linear import CastedLinear, set_fake_quantization
from pgl.module import GolfModule
from pgl.optim import OptimizerConfig, ScheduleConfig
from pgl.quant import FakeQuantConfig, QuantConfig, TensorRule
from pgl.quant.rows import RowGrid
from pgl.warm_up import compiled_graphs
from tests.parity.recipes import randomize, shallow
from tests.test_run import StopAfter, assert_same_state

# Scales of steps 0 to 5 with a warm-down over all of 6 steps: 1, 5/6, 4/6, 3/6, 2/6, 1/6.
SCHEDULE = ScheduleConfig(warmdown_steps=6)
BELOW_HALF = 4
"""First of those steps whose scale is below 0.5."""
COARSE = FakeQuantConfig(attention=2, mlp=2, bigram=2)


@pytest.fixture
def fast_compiler(monkeypatch):
    """torch.compile's tracing and guards, without the kernels, which take long to build."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


class Losses(Callback):
    """Notes the loss of each step, and which layers were being rounded."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.clips: list[set] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses.append(float(torch.stack(pl_module.step_losses).mean()))
            layers = [m for m in pl_module.modules() if isinstance(m, CastedLinear)]
            self.clips.append({layer.qat_clip for layer in layers})


def qat_run(golf_run, tiny_gpt, start, folder, compile=False, warmup_steps=1, **settings):
    losses = Losses()
    torch.manual_seed(0)
    module = GolfModule(
        replace(tiny_gpt, num_layers=1, init="orthogonal"),
        OptimizerConfig(grad_clip_norm=None),
        SCHEDULE,
        compile=compile,
    )
    settings.setdefault("qat", QuantizationAwareTraining(start, 0.5, COARSE))
    budget = WallClockBudget(seconds=None, steps=6, warmup_steps=warmup_steps)
    extra = (losses, *settings.pop("extra", ()))
    return golf_run(folder, module=module, budget=budget, extra=extra, **settings), losses


def test_the_compiled_step_changes_at_the_switch_and_nothing_is_compiled_then(
    golf_run, tiny_gpt, fast_compiler
):
    _, plain = qat_run(golf_run, tiny_gpt, "never", "plain")
    _, eager = qat_run(golf_run, tiny_gpt, "late", "eager")
    run, compiled = qat_run(golf_run, tiny_gpt, "late", "compiled", compile=True)
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4)
    assert eager.losses[:BELOW_HALF] == plain.losses[:BELOW_HALF]
    # The weights of this step are those of the plain run: rounding alone moves its loss.
    assert abs(compiled.losses[BELOW_HALF] - plain.losses[BELOW_HALF]) > 1e-3
    assert compiled.clips == [{None}] * BELOW_HALF + [{1}] * 2
    assert run.callback(QuantizationAwareTraining).first_step == BELOW_HALF
    assert compiled_graphs() > 0
    assert run.callback(WallClockBudget).graphs_compiled == 0


@pytest.mark.slow
def test_the_kernels_that_run_change_at_the_switch(golf_run, tiny_gpt):
    torch._dynamo.reset()
    _, eager = qat_run(golf_run, tiny_gpt, "late", "eager")
    run, compiled = qat_run(golf_run, tiny_gpt, "late", "compiled", compile=True)
    until_the_switch = slice(BELOW_HALF + 1)  # behind it a weight may round to its other neighbour
    assert compiled.losses[until_the_switch] == pytest.approx(
        eager.losses[until_the_switch], rel=5e-4
    )
    assert run.callback(WallClockBudget).graphs_compiled == 0


def test_a_variant_that_was_not_primed_is_found_out(golf_run, tiny_gpt, fast_compiler, monkeypatch):
    class Unannounced(QuantizationAwareTraining):
        def on_fit_start(self, trainer, pl_module): ...

    qat = Unannounced("late", 0.5, COARSE)
    with pytest.warns(UserWarning, match="1 graphs were compiled while the training clock ran"):
        run, _ = qat_run(golf_run, tiny_gpt, "late", "run", compile=True, qat=qat)
    assert run.callback(WallClockBudget).report()["graphs_compiled"] == 1


@pytest.mark.parametrize("start", ["first_step", "late"])
@pytest.mark.parametrize("stop", [2, 5], ids=["before the switch", "after it"])
def test_resuming_goes_on_exactly(golf_run, tiny_gpt, start, stop):
    whole, losses = qat_run(golf_run, tiny_gpt, start, "whole")
    part = interrupted(golf_run, tiny_gpt, start, stop)
    was_on = part.callback(QuantizationAwareTraining).is_on
    assert was_on == (start == "first_step" or stop == 5)
    resumed, after = qat_run(
        golf_run, tiny_gpt, start, "resumed", ckpt_path=part.folder / "last.ckpt"
    )
    assert_same_state(whole, resumed)
    assert after.clips == losses.clips[stop:]
    # A run whose switch is behind it has one variant to prime.
    assert len(resumed.callback(WallClockBudget).variants) == (not was_on)
    first = whole.callback(QuantizationAwareTraining).first_step
    assert resumed.callback(QuantizationAwareTraining).first_step == first


def test_a_resumed_run_compiles_what_it_will_use(golf_run, tiny_gpt, fast_compiler):
    part = interrupted(golf_run, tiny_gpt, "late", 5)
    before = compiled_graphs()
    resumed, _ = qat_run(
        golf_run, tiny_gpt, "late", "resumed", True, ckpt_path=part.folder / "last.ckpt"
    )
    assert resumed.callback(WallClockBudget).graphs_compiled == 0
    # Training once, validation and sliding windows in at most two shapes each.
    assert compiled_graphs() - before <= 5


def interrupted(golf_run, tiny_gpt, start, stop):
    checkpoint = RunCheckpoint(every_steps=stop)
    run, _ = qat_run(
        golf_run, tiny_gpt, start, "part", extra=(StopAfter(stop),), checkpoint=checkpoint
    )
    return run


def test_it_is_off_for_whatever_comes_after_training(golf_run, tiny_gpt):
    run, losses = qat_run(golf_run, tiny_gpt, "first_step", "run")
    assert losses.clips == [{1}] * 6
    layers = [m for m in run.module.modules() if isinstance(m, CastedLinear)]
    assert {layer.qat_clip for layer in layers} == {None}


def test_the_report_and_the_curve_say_when(golf_run, tiny_gpt, monkeypatch):
    logged = []
    run, _ = qat_run(golf_run, tiny_gpt, "late", "run", fit=False)
    log_metrics = run.trainer.logger.log_metrics

    def record(metrics, step):
        logged.extend((step, v) for k, v in metrics.items() if k.endswith("fake_quantization"))
        log_metrics(metrics, step)

    monkeypatch.setattr(run.trainer.logger, "log_metrics", record)
    run.trainer.fit(run.module, datamodule=run.data)
    assert logged == [(2, 0.0), (4, 0.0), (6, 1.0)]
    rows = json.loads((run.folder / "report.json").read_text())["techniques"]
    (row,) = [row for row in rows if row["technique"] == "fake quantisation"]
    assert row["setting"] == "late, below scale 0.5: attention int2, mlp int2, bigram int2"
    assert row["acted"] == "from step 4"
    never, _ = qat_run(golf_run, tiny_gpt, "never", "never")
    rows = json.loads((never.folder / "report.json").read_text())["techniques"]
    assert "fake quantisation" not in {row["technique"] for row in rows}


def test_every_layer_that_is_rounded_moves_the_loss_by_itself():
    gpt = randomize(GPT(shallow("703"))).train()
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))

    def loss() -> float:
        return gpt.token_losses(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).mean().item()

    plain = loss()
    everywhere = FakeQuantConfig(attention=3, mlp=3, bigram=3, value_embedding=3)
    names = set_fake_quantization(gpt, everywhere)
    layers = {name: m for name, m in gpt.named_modules() if isinstance(m, CastedLinear)}
    assert names == list(layers)
    for name, layer in layers.items():
        set_fake_quantization(gpt, None)
        assert loss() == plain
        layer.qat_clip = 3
        assert loss() != plain, name


def test_bits_are_given_by_group():
    gpt = GPT(shallow("703"))
    names = set_fake_quantization(gpt, FakeQuantConfig(scale_floor=True))
    assert not [name for name in names if name.startswith("ve_shared")]
    assert "bigram.proj" in names
    for name in names:
        layer = gpt.get_submodule(name)
        assert layer.qat_clip == (15 if ".mlp." in name else 31)
        assert layer.qat_scale_floor
    assert set_fake_quantization(gpt, FakeQuantConfig(None, None, None, 8)) == ["ve_shared.proj"]
    assert gpt.ve_shared.proj.qat_clip == 127
    assert gpt.blocks[0].mlp.fc.qat_clip is None


def setup(qat, schedule=SCHEDULE, callbacks=(), **budget):
    module = GolfModule(shallow("324", num_layers=2), schedule=schedule)
    clock = WallClockBudget(**budget)
    trainer = SimpleNamespace(
        callbacks=[clock, qat, *callbacks], max_steps=-1, world_size=1, global_step=0
    )
    clock.setup(trainer, module, "fit")
    qat.setup(trainer, module, "fit")
    return trainer, module


@pytest.mark.parametrize(
    ("schedule", "budget"),
    [
        (ScheduleConfig(warmdown_steps=0), {"seconds": 600}),
        (ScheduleConfig(warmdown_steps=None, warmdown_fraction=0.0), {"seconds": 600}),
        # The last of 100 steps has scale 1/5.
        (ScheduleConfig(warmdown_steps=5), {"seconds": None, "steps": 100}),
        # 3,000 steps become 3, whose last has scale 1/3.
        (ScheduleConfig(), {"seconds": None, "steps": 100, "step_scale": 0.001}),
    ],
)
def test_a_threshold_out_of_reach_is_refused(schedule, budget):
    with pytest.raises(ValueError, match=r"never falls below qat\.start_scale=0\.15"):
        setup(QuantizationAwareTraining("late"), schedule, **budget)
    setup(QuantizationAwareTraining("first_step"), schedule, **budget)


@pytest.mark.parametrize("budget", [{"seconds": 600}, {"seconds": None, "steps": 100}])
def test_a_threshold_within_reach_is_taken(budget):
    setup(QuantizationAwareTraining("late"), ScheduleConfig(warmdown_steps=7), **budget)


def test_a_run_that_is_cut_short_before_the_switch_warns():
    qat = QuantizationAwareTraining("late")
    trainer, module = setup(qat, seconds=600)
    module.lr_scale = 0.4
    with pytest.warns(UserWarning, match=r"start_scale=0\.15 \(it was 0\.400\): no step was"):
        qat.on_train_end(trainer, module)


def test_a_grid_other_than_the_exports_warns():
    int6 = GPTQExport(QuantConfig(mlp=TensorRule(grid=RowGrid(bits=6))))
    with pytest.warns(UserWarning, match=r"qat\.layers\.mlp rounds to 5 bits.*stores 6"):
        setup(QuantizationAwareTraining("late"), callbacks=[int6], seconds=600)
    same = FakeQuantConfig(mlp=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup(QuantizationAwareTraining("late", layers=same), callbacks=[int6], seconds=600)
        setup(QuantizationAwareTraining("never"), callbacks=[int6], seconds=600)


def test_a_run_that_has_it_off_leaves_it_off():
    on = {"is_on": True, "first_step": 3}
    qat = QuantizationAwareTraining("never")
    with pytest.warns(UserWarning, match=r"goes off now because qat\.start is never"):
        qat.load_state_dict(on)
    assert not qat.is_on
    qat = QuantizationAwareTraining("late")
    qat.load_state_dict(on)
    assert qat.state_dict() == on


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_scale": 0.0}, r"qat\.start_scale"),
        ({"start_scale": 1.5}, r"qat\.start_scale"),
        ({"start": "late", "layers": FakeQuantConfig(None, None, None)}, "no group any bits"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(**settings)


@pytest.mark.parametrize("bits", [1, 9])
def test_bad_bits_are_refused(bits):
    with pytest.raises(ValueError, match=rf"qat\.layers\.mlp is {bits}"):
        FakeQuantConfig(mlp=bits)


def test_the_command_line_has_its_key(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--qat.start=late", "--qat.layers.mlp=7", "--print_config"])
    assert stop.value.code == 0
    section = capsys.readouterr().out.split("qat:")[1].split("averaging:")[0]
    assert "start: late" in section
    assert "mlp: 7" in section
    assert math.isclose(float(section.split("start_scale: ")[1].split()[0]), 0.15)
