"""Every recipe and overlay is valid, and every recipe runs, with the smallest of everything."""

import json
from pathlib import Path

import pytest
import yaml

from pgl.cli import main

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
OVERLAYS = sorted([*CONFIGS.glob("data/*.yaml"), *CONFIGS.glob("hardware/*.yaml")])


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def resolved(capsys, *paths: Path) -> dict:
    arguments = [argument for path in paths for argument in ("--config", str(path))]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def leaves(config, prefix=()):
    """Yield the path and value of everything that a file sets."""
    for key, value in config.items():
        if isinstance(value, dict) and "class_path" not in value:
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def at(config, path):
    for key in path:
        config = config[key]
    return config


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
def test_an_overlay_wins_over_every_recipe(overlay, capsys):
    # All recipes take the same keys; one of them stands for the rest.
    config = resolved(capsys, CONFIGS / "pr703.yaml", overlay)
    for path, value in leaves(yaml.safe_load(overlay.read_text())):
        found = at(config, path)
        if isinstance(value, dict):
            assert found["class_path"].rsplit(".", 1)[-1] == value["class_path"].rsplit(".", 1)[-1]
            for key, argument in value.get("init_args", {}).items():
                assert found["init_args"][key] == argument
        else:
            assert found == value, path


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipe_runs(recipe, tiny_corpus, tmp_path, capsys):
    arguments = ["fit", "--config", str(recipe)]
    arguments += ["--config", str(CONFIGS / "hardware" / "tiny.yaml")]
    arguments += [
        "--data.source=pgl.data.Shards",
        f"--data.source.init_args.directory={tiny_corpus.directory}",
        f"--data.source.init_args.tokenizer_path={tiny_corpus.tokenizer_path}",
        "--model.gpt.vocab_size=320",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    main(arguments)
    (path,) = tmp_path.glob("*/*/report.json")
    report = json.loads(path.read_text())
    assert report["name"] == recipe.stem
    assert report["training"]["steps"] == 2
    assert report["model"]["gpt"]["num_layers"] == 11
    assert report["scores"][-1]["weights"] == "quantised"
    assert 0 < report["scores"][-1]["bpb"] < 20
    assert (path.parent / "model.pgl").stat().st_size == report["artifact"]["total_bytes"]
    out = capsys.readouterr().out
    assert f"{report['scores'][-1]['bpb']:.6f} bits/byte" in out
