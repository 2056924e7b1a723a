"""The report's rows: what is on and when it acted, nothing that is off; strict JSON."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from callbacks import (
    BudgetProgress,
    EMAConfig,
    GPTQExport,
    RunReport,
    SlidingWindowBPB,
    SnapshotConfig,
    TrainingMetrics,
    WallClockBudget,
    WeightAveraging,
)
from callbacks.techniques import techniques
from pgl.model import GPTConfig
from pgl.module import GolfModule
from pgl.objective import LossConfig
from pgl.optim import OptimizerConfig, build_optimizer
from pgl.quant import QuantConfig, TensorRule

SIZE = {"vocab_size": 64, "num_layers": 4, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1}


def rows(module, averaging=None, artifact=None, validation=None, seq_len=64, **budget_state):
    budget, metrics = WallClockBudget(seconds=None, steps=9), TrainingMetrics()
    vars(budget).update(budget_state)
    metrics.load_state_dict({"clipped_steps": 3})
    averaging = averaging or WeightAveraging(None, source="raw")
    averaging.setup(SimpleNamespace(callbacks=[budget]), module, "fit")
    artifact = artifact or GPTQExport()
    validation = validation or SlidingWindowBPB(stride_tokens=seq_len)
    trainer = SimpleNamespace(
        callbacks=[budget, metrics, averaging, artifact, validation],
        datamodule=SimpleNamespace(seq_len=seq_len),
        optimizers=[build_optimizer(module.gpt, module.optimizer_config)],
        global_step=9,
    )
    return {row["technique"]: row for row in techniques(trainer, module)}


def test_what_is_off_is_not_listed():
    gpt = GPTConfig(
        **{**SIZE, "num_kv_heads": 2},
        unet_skips=False,
        resid_mix=False,
        tie_embeddings=False,
        logit_softcap=30.0,
        qk_norm=False,
        qk_gain_init=None,
    )
    optimizer = OptimizerConfig(muon_weight_decay=0, adam_weight_decay=0, grad_clip_norm=None)
    assert set(rows(GolfModule(gpt, optimizer))) == {"learning-rate warmdown", "logit softcap"}


def test_what_is_on_is_listed_with_when_it_acted():
    gpt = GPTConfig(
        **SIZE,
        smear_gate=True,
        bigram_buckets=32,
        bigram_dim=8,
        value_embedding_layers=[2, 3],
        value_embedding_dim=8,
        xsa_last_layers=2,
        ln_scale=True,
        rope_dims=4,
        init="orthogonal",
    )
    module = GolfModule(
        gpt,
        OptimizerConfig(muon_weight_decay=0.04, adam_weight_decay=0.01, grad_clip_norm=0.3),
        loss=LossConfig(mile_gamma=1.1),
    )
    averaging = WeightAveraging(EMAConfig(), SnapshotConfig())
    table = rows(module, averaging, warmdown_start_step=1234, mile_end_step=7)
    assert {
        "U-Net skips",
        "residual mix with x0",
        "SmearGate",
        "BigramHash",
        "value embeddings",
        "XSA",
        "LN scale",
        "partial RoPE",
        "orthogonal init",
        "tied embeddings",
    } <= set(table)
    assert table["Muon weight decay"]["setting"] == "0.04"
    assert table["AdamW weight decay"]["setting"] == "0.01"
    assert table["gradient clipping"]["acted"] == "in 3 of 9 steps"
    assert table["learning-rate warmdown"]["acted"] == "from step 1,234"
    assert table["MiLe loss"]["acted"] == "from step 0 until step 7"
    assert table["weight averaging: swa"]["acted"] == "0 updates, never"
    assert rows(module)["MiLe loss"]["acted"] == "from step 0"
    assert rows(module)["learning-rate warmdown"]["acted"] == "never"


def test_the_parts_of_the_model_are_listed_with_their_settings():
    gpt = GPTConfig(
        **SIZE,
        smear_gate=True,
        smear_document_reset=True,
        mlp_activation="leaky_relu2",
        output_proj_init="scaled",
    )
    table = rows(GolfModule(gpt))
    assert table["leaky ReLU squared"]["setting"] == "slope 0.5"
    assert table["SmearGate document reset"]["acted"] == "every step"
    assert table["scaled init of output projections"]["acted"] == "at the start"
    assert table["grouped-query attention"]["setting"] == "1 of 2 heads"
    assert table["q gain"]["setting"] == "from 1.5"
    assert "QK norm" in table


def test_rope_is_rescaled_beyond_its_reference_length_only():
    module, name = GolfModule(GPTConfig(**SIZE, rope_train_len=64)), "NTK-aware RoPE rescaling"
    assert name not in rows(module, seq_len=64)
    assert rows(module, seq_len=128)[name]["acted"] == "every step"
    longer = SlidingWindowBPB(stride_tokens=32, seq_len=128)
    row = rows(module, validation=longer)[name]
    assert row["acted"] == "when scoring with sliding windows"
    assert row["setting"] == "128 tokens, reference 64"


def test_small_momentum_is_listed_with_what_it_saves():
    module = GolfModule(GPTConfig(**SIZE), OptimizerConfig(momentum_format="int8"))
    row = rows(module)["Muon momentum format"]
    saved = build_optimizer(module.gpt, module.optimizer_config).momentum_bytes_saved()
    assert row["setting"] == "int8"
    assert row["acted"] == f"every step, saves {saved / 1e6:.2f} MB"


@pytest.mark.parametrize("momentum_format", ["float32", "int8"])
def test_what_small_momentum_saves_is_printed_when_training_begins(
    golf_run, tiny_gpt, capsys, momentum_format
):
    optimizer = OptimizerConfig(momentum_format=momentum_format)
    bar = BudgetProgress()
    bar._console = Console(file=io.StringIO(), width=120)
    run = golf_run(
        module=GolfModule(tiny_gpt, optimizer),
        budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0),
        progress=bar,
    )
    made = run.trainer.optimizers[0]
    taken, saved = made.momentum_bytes() / 1e6, made.momentum_bytes_saved() / 1e6
    line = f"int8 momentum takes {taken:.2f} MB and saves {saved:.2f} MB against float32"
    shown = bar._console.file.getvalue().splitlines()
    assert shown.count(line) == (momentum_format == "int8")
    if momentum_format == "int8":
        assert saved / (saved + taken) == pytest.approx(1 - 0.252, abs=0.001)
        assert shown.index(line) < shown.index("train ...")


def test_a_mean_of_one_snapshot_is_listed_as_never():
    averaging = WeightAveraging(None, SnapshotConfig(), source="swa")
    module = GolfModule(GPTConfig(**SIZE))
    rows(module, averaging)
    for updates, acted in ((1, "1 updates, from step 5, too few: never"), (2, "2 updates, from")):
        averaging.averages["swa"].update(dict(module.gpt.named_parameters()))
        averaging.first_update_step["swa"] = 5
        row = rows(module, averaging)["weight averaging: swa"]
        assert row["acted"].startswith(acted), updates


def test_gptq_pruning_and_sliding_windows_are_listed_if_they_acted():
    quant = QuantConfig(
        mlp=TensorRule(method="gptq"),
        passthrough_max_numel=8000,
        prune_fraction=0.05,
        prune_min_numel=20_000,
    )
    artifact = GPTQExport(quant, calibration_sequences=16)
    validation = SlidingWindowBPB(stride_tokens=16)
    module = GolfModule(GPTConfig(**SIZE))
    table = rows(module, artifact=artifact, validation=validation)
    for name in ("GPTQ", "pruning", "sliding-window scoring"):
        assert table[name]["acted"] == "never"
    artifact.exported = SimpleNamespace(state_dict=module.gpt.state_dict())
    validation.scores = [SimpleNamespace(weights="quantised", windows="sliding")]
    table = rows(module, artifact=artifact, validation=validation)
    assert table["GPTQ"]["setting"] == "mlp; steps grid; search off; 16 calibration sequences"
    assert table["GPTQ"]["acted"] == "on 8 matrices at export"  # up and down in 4 layers
    assert table["pruning"]["acted"] == "on 8 matrices at export"
    assert table["sliding-window scoring"]["setting"] == "stride of 16 in windows of 64 tokens"
    assert table["sliding-window scoring"]["acted"] == "scored quantised weights"


def test_the_report_of_a_run_is_strict_json(golf_run, capsys):
    run = golf_run(
        budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0),
        averaging=WeightAveraging(None, source="raw"),
    )

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    text = (run.folder / "report.json").read_text()
    report = json.loads(text, parse_constant=refuse)
    assert report["name"] == "run"
    assert [score["weights"] for score in report["scores"]] == ["raw", "quantised", "quantised"]
    assert report["averaging"] == {"source": "raw"}
    assert report["environment"]["device"].startswith("1 x cpu")
    assert not [row for row in report["techniques"] if "averaging" in row["technique"]]
    assert f"{report['scores'][-1]['bpb']:.6f} bits/byte" in capsys.readouterr().out


def test_only_rank_zero_writes(tmp_path):
    trainer = SimpleNamespace(log_dir=tmp_path, is_global_zero=False)
    RunReport().on_train_end(trainer, None)
    assert not list(tmp_path.iterdir())
