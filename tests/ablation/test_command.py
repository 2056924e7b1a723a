import json
from pathlib import Path

import pytest

from pgl.ablation import command
from pgl.ablation.command import main
from pgl.tools import run_tool

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PR236 = str(CONFIGS / "pr236.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs --config"),
        (["--config", PR236], "needs --off or --trial"),
        (["--config", PR236, "--off", "xsa"], "--off xsa: the recipe does not have it on"),
        (["--config", PR236, "--off", "swa", "--seeds", "1", "1"], "a seed is there twice"),
        (["--config", PR236, "--off", "swa", "--gpus", "0"], "--gpus must be at least 1"),
        (["--config", PR236, "--trial", "x"], "--trial: expected 2 arguments"),
        (["--config", "absent.yaml", "--off", "swa"], "absent.yaml"),
    ],
)
def test_a_mistake_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_tool(["ablate", *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("pgl: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_dry_run_prints_what_each_trial_changes(capsys):
    arguments = ["--config", PR236, "--off", "swa", "--trial", "lr", "--model.optimizer.beta1=0.8"]
    assert main([*arguments, "--dry-run", "--", "--model.gpt.ln_scale", "true"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "unchanged: the recipe",
        "no_swa: averaging.swa=None, averaging.source=raw",
        "lr: model.optimizer.beta1=0.8",
    ]


def test_gpus_come_from_the_environment_if_it_names_them(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert command._devices(None) == [None]
    assert command._devices(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert command._devices(2) == ["4", "5"]
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=4,5,7 names only 3"):
        command._devices(4)


@pytest.mark.slow
def test_an_ablation_runs_is_resumed_and_compared(tiny_corpus, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--config", str(CONFIGS / "pr703.yaml")]
    arguments += ["--config", str(CONFIGS / "hardware" / "tiny.yaml"), "--off", "xsa"]
    # Flash attention 3 does not run on a CPU.
    arguments += ["--trial", "broken", "--model.gpt.attention_backend=fa3"]
    arguments += ["--seeds", "1", "2", "--out", str(out), "--"]
    arguments += [
        "--data.source=pgl.data.Shards",
        f"--data.source.init_args.directory={tiny_corpus.directory}",
        f"--data.source.init_args.tokenizer_path={tiny_corpus.tokenizer_path}",
        "--model.gpt.vocab_size=320",
    ]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    said = "exit status 2: pgl: error: model.gpt.attention_backend fa3"
    assert f"broken, seed 1 failed: {said}" in captured.out
    content = json.loads((out / "ablation.json").read_text())
    assert [group["label"] for group in content["groups"]] == ["unchanged", "no_xsa"]
    assert content["baseline"] == "unchanged"
    assert content["groups"][1]["against_baseline"]["p"] is not None
    assert [run["name"] for run in content["unfinished"]] == ["broken", "broken"]

    # A run that was cut short behind its last checkpoint is taken up there; the others are kept.
    cut = out / "no_xsa" / "version_2"
    before = json.loads((cut / "report.json").read_text())
    (cut / "report.json").unlink()
    kept = (out / "unchanged" / "version_1" / "report.json").stat().st_mtime_ns
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "6 runs: 3 finished before" in said
    assert "start  no_xsa, seed 2 from last.ckpt" in said
    after = json.loads((cut / "report.json").read_text())
    assert after["training"]["steps"] == before["training"]["steps"]
    assert [s["bpb"] for s in after["scores"]] == [s["bpb"] for s in before["scores"]]
    assert (out / "unchanged" / "version_1" / "report.json").stat().st_mtime_ns == kept
