"""The command line, in process: what wins over what, one-line errors, every subcommand."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from pgl.artifact import is_artifact
from pgl.cli import GolfCLI, main
from pgl.data import Shards, TokenDataModule
from pgl.data.sources import DownloadError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUICKSTART = ["--config", str(CONFIGS / "quickstart.yaml")]
TINY = ["--config", str(CONFIGS / "hardware" / "tiny.yaml")]


def data_options(corpus: Shards) -> list[str]:
    return [
        "--data.source=pgl.data.Shards",
        f"--data.source.init_args.directory={corpus.directory}",
        f"--data.source.init_args.tokenizer_path={corpus.tokenizer_path}",
        "--data.seq_len=64",
        "--data.batch_tokens=512",
        "--data.max_val_tokens=300",
        "--data.val_batch_windows=4",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
    ]


def run_options(folder: Path) -> list[str]:
    return [
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.logger.init_args.version=run",
    ]


@dataclass
class Fitted:
    """What ``pgl fit`` left."""

    folder: Path
    data: list[str]
    checkpoint: str
    artifact: str


@pytest.fixture(scope="module")
def fitted(tiny_corpus, tmp_path_factory) -> Fitted:
    """One tiny run with two layers and settings of its own."""
    folder = tmp_path_factory.mktemp("cli")
    data = data_options(tiny_corpus)
    model = ["--model.gpt.vocab_size=320", "--model.gpt.num_layers=2", "--model.gpt.qk_gain_init=2"]
    model += ["--model.schedule.warmdown_steps=77"]
    main(["fit", *TINY, *data, *run_options(folder), *model])
    run = folder / "run" / "run"
    return Fitted(run, data, str(run / "last.ckpt"), str(run / "model.pgl"))


def printed(capsys, *arguments: str) -> dict:
    """Return the configuration that a command line amounts to."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    """Return the one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pgl: error: ")
    return line


def test_fit_keeps_its_resolved_configuration(fitted, capsys):
    assert is_artifact(fitted.artifact)
    saved = yaml.safe_load((fitted.folder / "config.yaml").read_text())
    assert saved["model"]["gpt"]["num_layers"] == 2
    assert saved["budget"]["steps"] == 2
    again = printed(capsys, "fit", "--config", str(fitted.folder / "config.yaml"))
    again.pop("ckpt_path", None)
    saved.pop("ckpt_path", None)
    assert again == saved


def test_a_printed_configuration_is_a_configuration(tmp_path, capsys):
    first = printed(capsys, "fit", *TINY)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(first))
    assert printed(capsys, "fit", "--config", str(path)) == first


def test_overlays_merge_key_by_key(tmp_path, capsys):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("budget: {seconds: 33, warmup_steps: 7}\naveraging: {ema: {decay: 0.5}}\n")
    two.write_text("budget: {seconds: 44}\naveraging: {ema: {start_fraction: 0.25}}\n")
    recipe = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    merged = printed(capsys, "fit", *QUICKSTART, "-c", str(one), "-c", str(two), "--budget.steps=9")
    assert merged["budget"] == {
        "seconds": 44,
        "steps": 9,
        "reserve_seconds": 0.0,
        "warmup_steps": 7,
        "step_scale": 1.0,
    }
    assert merged["averaging"]["ema"]["decay"] == 0.5
    assert merged["averaging"]["ema"]["start_fraction"] == 0.25
    horizon = recipe["averaging"]["ema"]["horizon_fraction"]
    assert merged["averaging"]["ema"]["horizon_fraction"] == horizon


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.gpt.layerz=5"], "layerz"),
        (["--model.gpt.num_layers=many"], "model.gpt.num_layers"),
        (["--budget.second=5"], "budget.second"),
        (["--trainer.max_stepz=5"], "max_stepz"),
        (["--model.gpt.num_heads=5"], "num_heads 5"),
        (["--budget.seconds=-1"], "budget.seconds"),
        (["--averaging.source=swa"], "averaging.swa is off"),
        (["--data.batch_tokens=500"], "data.batch_tokens=500"),
        (["--artifact.codec=zip"], 'codec "zip"'),
        (["--checkpoint.every_steps=5", "--checkpoint.every_seconds=5"], "choose one"),
        (["--generation.top_k=0"], "generation.top_k"),
        (["--config=absent.yaml"], "absent.yaml"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments, named, capsys):
    assert named in refused(capsys, "fit", *TINY, *arguments)


def test_an_unknown_key_in_a_file_is_named(tmp_path, capsys):
    path = tmp_path / "typo.yaml"
    path.write_text("model: {gpt: {num_layerz: 3}}\n")
    assert "num_layerz" in refused(capsys, "fit", *QUICKSTART, "-c", str(path))


def test_an_unknown_subcommand_is_one_line(capsys):
    assert "invalid choice: 'train'" in refused(capsys, "train")


@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_validate_needs_no_model_settings(fitted, kind, capsys, tmp_path):
    # The checkpoint has the model: two layers, 320 tokens, width 32; nothing else says so.
    path = getattr(fitted, kind)
    main(["validate", *fitted.data, *run_options(tmp_path), f"--ckpt_path={path}"])
    assert "val/bpb" in capsys.readouterr().out


def test_precedence_is_defaults_checkpoint_files_command_line(fitted, capsys, tmp_path):
    ckpt = f"--ckpt_path={fitted.checkpoint}"
    saved = printed(capsys, "validate", ckpt)["model"]
    assert saved["gpt"]["num_layers"] == 2
    assert saved["gpt"]["qk_gain_init"] == 2
    assert saved["schedule"]["warmdown_steps"] == 77
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {gpt: {qk_gain_init: 3}, loss: {mile_gamma: 0.5}}\n")
    files = printed(capsys, "validate", ckpt, "-c", str(overlay))["model"]
    assert (files["gpt"]["qk_gain_init"], files["loss"]["mile_gamma"]) == (3, 0.5)
    assert files["gpt"]["num_layers"] == 2
    typed = printed(
        capsys, "validate", "-c", str(overlay), "--ckpt_path", fitted.checkpoint,
        "--model.gpt.qk_gain_init=4",
    )["model"]  # fmt: skip
    assert typed["gpt"]["qk_gain_init"] == 4
    assert typed["loss"]["mile_gamma"] == 0.5
    assert printed(capsys, "validate")["model"]["gpt"]["num_layers"] == 9


def test_a_checkpoint_named_in_a_file_has_the_model_too(fitted, capsys, tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text(f"ckpt_path: {fitted.checkpoint}\nmodel: {{gpt: {{qk_gain_init: 3}}}}\n")
    gpt = printed(capsys, "validate", "-c", str(file))["model"]["gpt"]
    assert (gpt["num_layers"], gpt["qk_gain_init"]) == (2, 3)
    # The last one given wins, as for every other setting.
    assert printed(capsys, "validate", "-c", str(file), "--ckpt_path=null")["model"]["gpt"][
        "num_layers"
    ] == 9  # fmt: skip


def test_files_before_the_subcommand_win_over_the_checkpoint(fitted, capsys, tmp_path):
    file = tmp_path / "file.yaml"
    section = {"ckpt_path": fitted.checkpoint, "model": {"gpt": {"qk_gain_init": 3}}}
    file.write_text(yaml.safe_dump({"validate": section}))
    gpt = printed(capsys, "--config", str(file), "validate")["model"]["gpt"]
    assert (gpt["num_layers"], gpt["qk_gain_init"]) == (2, 3)
    section.pop("ckpt_path")
    file.write_text(yaml.safe_dump({"validate": section}))
    ckpt = ["--ckpt_path", fitted.checkpoint]
    gpt = printed(capsys, "--config", str(file), "validate", *ckpt)["model"]["gpt"]
    assert (gpt["num_layers"], gpt["qk_gain_init"]) == (2, 3)


def test_the_machine_of_the_checkpoint_is_left_behind(fitted, capsys, tmp_path):
    checkpoint = torch.load(fitted.checkpoint, weights_only=True)
    checkpoint["hyper_parameters"]["gpt"]["attention_backend"] = "cudnn"
    checkpoint["hyper_parameters"]["compile"] = True
    path = tmp_path / "gpu.ckpt"
    torch.save(checkpoint, path)
    model = printed(capsys, "validate", f"--ckpt_path={path}")["model"]
    assert (model["gpt"]["attention_backend"], model["compile"]) == ("auto", False)
    assert model["gpt"]["num_layers"] == 2
    options = [*fitted.data, *run_options(tmp_path), f"--ckpt_path={path}"]
    main(["validate", *options])


@pytest.mark.parametrize(
    "contents", [{"state_dict": {}}, {"state_dict": {}, "hyper_parameters": {"lr": 0.1}}, [1]]
)
def test_a_foreign_checkpoint_is_refused(contents, capsys, tmp_path):
    path = tmp_path / "foreign.ckpt"
    torch.save(contents, path)
    line = refused(capsys, "validate", f"--ckpt_path={path}")
    assert "foreign.ckpt is not a checkpoint of pgl" in line


def test_an_option_without_its_value_is_one_line(capsys):
    assert "--ckpt_path" in refused(capsys, "validate", "--ckpt_path")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_lightning_refuses_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *TINY, "--trainer.accelerator=gpu"])
    assert stop.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("pgl: error: No supported gpu backend found!")


def test_a_failed_download_is_one_line(fitted, capsys, tmp_path, monkeypatch):
    def fail(self):
        raise DownloadError("shard.bin could not be fetched:\nno route to host")

    monkeypatch.setattr(TokenDataModule, "prepare_data", fail)
    with pytest.raises(SystemExit) as stop:
        main(["validate", *fitted.data, *run_options(tmp_path), f"--ckpt_path={fitted.checkpoint}"])
    assert stop.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == "pgl: error: shard.bin could not be fetched: no route to host"


@pytest.mark.parametrize("rank", [0, 1])
def test_predict_prints_on_one_of_several_devices(rank, capsys):
    trainer = SimpleNamespace(predict=lambda **_: ["a text"], is_global_zero=rank == 0)
    GolfCLI.predict(SimpleNamespace(trainer=trainer))
    assert capsys.readouterr().out == ("a text\n" if rank == 0 else "")


def test_predict_continues_the_prompt_and_repeats_itself(fitted, capsys, tmp_path):
    def predict(*options):
        capsys.readouterr()
        common = ["--generation.prompt=the model", "--generation.max_new_tokens=12"]
        run = [*fitted.data, *run_options(tmp_path), f"--ckpt_path={fitted.artifact}"]
        main(["predict", *run, *common, *options])
        return capsys.readouterr().out

    first, again = predict("--generation.seed=1"), predict("--generation.seed=1")
    assert "the model" in first
    assert first == again != predict("--generation.seed=2")


def test_export_writes_the_artifact_of_a_checkpoint(fitted, capsys, tmp_path):
    out = tmp_path / "out.pgl"
    options = [*fitted.data, *run_options(tmp_path), "--artifact.codec=lzma"]
    main(["export", *options, f"--ckpt_path={fitted.checkpoint}", f"--out={out}"])
    assert is_artifact(out)
    assert f"{out.stat().st_size:,}" in capsys.readouterr().out


def test_export_of_an_artifact_is_refused(fitted, capsys, tmp_path):
    line = refused(
        capsys, "export", *fitted.data, *run_options(tmp_path), f"--ckpt_path={fitted.artifact}"
    )
    assert "is an artifact already" in line


def test_fit_from_an_artifact_or_a_broken_checkpoint_is_refused(fitted, capsys, tmp_path):
    options = ["fit", *TINY, *fitted.data, *run_options(tmp_path)]
    line = refused(capsys, *options, f"--ckpt_path={fitted.artifact}")
    assert "give the run's last.ckpt" in line
    broken = tmp_path / "broken.ckpt"
    shutil.copy(fitted.checkpoint, broken)
    broken.write_bytes(broken.read_bytes()[:1000])
    assert "broken.ckpt" in refused(capsys, *options, f"--ckpt_path={broken}")


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict", "export"])
def test_every_subcommand_has_help_and_takes_the_quickstart(subcommand, capsys):
    with pytest.raises(SystemExit) as stop:
        main([subcommand, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--ckpt_path" in text
    assert "--budget.seconds" in text
    assert "Newton-Schulz iterations per step." in " ".join(text.split())
    ckpt = ["--ckpt_path=some.ckpt"] if subcommand == "export" else []
    config = printed(capsys, subcommand, *QUICKSTART, *ckpt)
    recipe = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    assert config["model"]["gpt"]["num_layers"] == recipe["model"]["gpt"]["num_layers"] != 9


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_nothing_is_scored_that_was_never_trained(subcommand, capsys):
    with pytest.raises(SystemExit) as stop:
        main([subcommand])
    assert stop.value.code == 2
    assert "needs --ckpt_path" in capsys.readouterr().err
