"""The benchmarks start on a CPU, at tiny sizes, and end with a line of JSON."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgl.data import Shards
from pgl.model import linear

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
TINY = REPOSITORY / "configs" / "hardware" / "tiny.yaml"

QAT = {"start": "first_step", "layers": {"attention": 6, "mlp": 5}}

OPTIONS = {
    "train_step": ["--micro-batch-tokens=64", "--repeats=2", "--qat"],
    "muon": ["--repeats=2"],
    "evaluate": ["--seq-len=32", "--stride=8", "--windows=5", "--batch-windows=3", "--repeats=2"],
    "quantize": ["--sequences=3", "--sample-sequences=1", "--codecs", "rans", "lzma"],
}

KEYS = {
    "train_step": {
        "config", "processes", "backend", "kernels", "strategy", "micro_batch_tokens",
        "accumulate", "compile_seconds", "step_ms", "step_spread_ms", "forward_backward_ms",
        "forward_backward_spread_ms", "optimizer_ms", "optimizer_spread_ms", "collectives_share",
        "tokens_per_second", "mfu",
        "peak_memory_gib", "qat_off_ms", "qat_off_spread_ms", "qat_on_ms", "qat_on_spread_ms",
        "qat_cost_percent",
    },
    "muon": {"config", "processes", "parameters", "single", "peak_memory_gib"},
    "evaluate": {
        "config", "seq_len", "stride", "batch_windows", "backend", "device", "compile_seconds",
        "seconds", "spread_seconds", "windows_per_second", "tokens_per_second",
        "floor_windows_per_second", "share_of_floor", "peak_memory_gib",
    },
    "quantize": {
        "config", "device", "calibration_tokens", "seconds", "code_bytes", "code_entropy_bytes",
        "step_factor", "packs",
    },
    "trainer_overhead": {
        "batch_tokens", "accumulate", "trainer_ms", "bare_loop_ms", "overhead_percent",
    },
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path) -> dict[str, Any]:
    """The tiny overlay, with two layers, fake quantisation and codes for every matrix."""
    values = yaml.safe_load(TINY.read_text())
    values["model"]["gpt"] |= {"vocab_size": 320, "num_layers": 2}
    values["data"] |= {"seq_len": 32, "batch_tokens": 128}
    return {**values, "qat": QAT, "artifact": {"quant": {"passthrough_max_numel": 0}}}


def written(recipe: dict[str, Any], folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def here(name: str, *options: str, capsys, monkeypatch) -> str:
    """Run a benchmark in this process, which has imported everything; return what it printed."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def alone(*command: str, folder: Path) -> str:
    """Run Python on a benchmark as a user does; return what it printed."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(folder),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_line(output: str) -> dict[str, Any]:
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("name", OPTIONS)
def test_it_ends_with_a_line_of_json(name, recipe, tmp_path, capsys, monkeypatch):
    options = ["--config", written(recipe, tmp_path), *OPTIONS[name]]
    result = last_line(here(name, *options, capsys=capsys, monkeypatch=monkeypatch))
    assert set(result) == KEYS[name]
    assert result["config"] == options[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_it_starts_by_itself(name, recipe, tmp_path):
    config = ["--config", written(recipe, tmp_path)]
    script = str(BENCHMARKS / f"{name}.py")
    assert set(last_line(alone(script, *config, *OPTIONS[name], folder=tmp_path))) == KEYS[name]


@pytest.mark.slow
def test_the_trainers_overhead_takes_the_options_of_fit(tiny_corpus: Shards, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options = [
        f"--config={TINY}",
        "--model.gpt.vocab_size=320",
        "--model.gpt.num_layers=2",
        "--data.seq_len=32",
        "--data.batch_tokens=256",
        "--data.micro_batch_tokens=128",
        "--data.source=pgl.data.Shards",
        f"--data.source.init_args.directory={tiny_corpus.directory}",
        f"--data.source.init_args.tokenizer_path={tiny_corpus.tokenizer_path}",
    ]
    result = last_line(alone(str(BENCHMARKS / "trainer_overhead.py"), *options, folder=scratch))
    assert set(result) == KEYS["trainer_overhead"]
    assert (result["batch_tokens"], result["accumulate"]) == (256, 2)
    assert result["trainer_ms"] > 0
    assert result["bare_loop_ms"] > 0
    assert not list(scratch.iterdir())


@pytest.mark.slow
def test_muon_measures_both_strategies_on_two_processes(recipe, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(BENCHMARKS / "muon.py")
    options = ["--config", written(recipe, tmp_path), *OPTIONS["muon"]]
    result = last_line(alone(*torchrun, script, *options, folder=tmp_path))
    assert result["processes"] == 2
    times = [result[strategy]["step_ms"] for strategy in ("ddp", "parallel_muon")]
    assert min(*times, result["gradient_all_reduce_ms"]) > 0
    # Parallel Muon reduces the gradients within its step.
    assert result["parallel_muon"]["collectives_ms"] > 0


def test_the_cost_of_fake_quantisation_is_that_of_its_rounding(
    recipe, tmp_path, capsys, monkeypatch
):
    """Slow rounding must show in the one time and not in the other."""
    rounding = linear.fake_quantize

    def slow_rounding(*arguments: Any) -> Any:
        time.sleep(0.003)
        return rounding(*arguments)

    monkeypatch.setattr(linear, "fake_quantize", slow_rounding)
    options = ["--config", written(recipe, tmp_path), *OPTIONS["train_step"]]
    result = last_line(here("train_step", *options, capsys=capsys, monkeypatch=monkeypatch))
    # At least 3 ms for each of the six matrices of two layers in two micro-batches.
    assert result["qat_on_ms"] - result["qat_off_ms"] > 0.8 * 3 * 6 * 2 * 2
    cost = 100 * (result["qat_on_ms"] / result["qat_off_ms"] - 1)
    assert result["qat_cost_percent"] == pytest.approx(cost, rel=0.01)


@pytest.mark.parametrize(
    ("qat", "message"),
    [
        (None, "has no qat.layers"),
        ({"start": "never"}, "has no qat.layers"),
        ({"layers": {"attention": None, "mlp": None}}, "rounds no layer of this model"),
    ],
)
def test_a_recipe_without_fake_quantisation_has_no_cost_of_it(
    qat, message, recipe, tmp_path, capsys, monkeypatch
):
    config = written({**recipe, "qat": qat}, tmp_path)
    options = ["--config", config, *OPTIONS["train_step"]]
    with pytest.raises(SystemExit, match=message):
        here("train_step", *options, capsys=capsys, monkeypatch=monkeypatch)
