"""What the documents name exists: tests, settings, files, switches, recipes."""

import re
from pathlib import Path

import pytest

from pgl.ablation import SWITCHES
from pgl.ablation.trials import resolve

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*REPOSITORY.glob("docs/*.md"), REPOSITORY / "README.md"])
TECHNIQUES = (REPOSITORY / "docs" / "techniques.md").read_text()
RECIPES = (REPOSITORY / "docs" / "recipes.md").read_text()
RECORDS = ("baseline", "pr236", "pr324", "pr388", "pr703")


@pytest.fixture(scope="module")
def settings():
    return {
        name: resolve(["--config", str(REPOSITORY / "configs" / f"{name}.yaml")], name)
        for name in RECORDS
    }


def switch_rows():
    """Return the cells of the table of switches by the name in the first one."""
    table = TECHNIQUES.split("## All switches")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_is_named_exists(document):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", document.read_text())
    for path, function in named:
        assert (REPOSITORY / path).is_file(), path
        text = (REPOSITORY / path).read_text()
        assert f"def {function}(" in text or not function, f"{path}::{function}"
    assert named or document.name != "techniques.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document):
    text = document.read_text()
    named = re.findall(r"(?<![\w/])((?:configs|docs|benchmarks)/[\w/]+\.\w+)", text)
    for path in named:
        if "RECIPE" not in path:
            assert (REPOSITORY / path).exists(), path


def test_every_key_that_a_technique_names_is_a_setting(settings):
    flat = settings["pr324"]  # with all callbacks, both kinds of averages and fake quantisation
    known = {**settings["pr703"], **flat}
    sentences = re.findall(r"Keys?: (.*?)(?=Test:|\n\n|\|)", TECHNIQUES, re.DOTALL)
    assert len(sentences) > 30
    keys = [key for sentence in sentences for key in re.findall(r"`([\w.]+\.[\w.]+)", sentence)]
    keys += [key for row in switch_rows().values() for key in re.findall(r"`([\w.]+)`", row[1])]
    for key in keys:
        assert any(name == key or name.startswith(f"{key}.") for name in known), key


def test_every_technique_says_how_it_is_tested():
    body = TECHNIQUES.split("\n## Architecture")[1].split("## What the PRs declared")[0]
    for section in re.split(r"\n### ", body)[1:]:
        title = section.splitlines()[0]
        assert "Test: " in section, title
        assert "`tests/" in section.split("Test: ")[1], title


def test_the_table_of_switches_is_the_registry(settings):
    rows = switch_rows()
    assert list(rows) == list(SWITCHES)
    for name, (technique, keys, recipes, test) in rows.items():
        switch = SWITCHES[name]
        assert switch.technique in (technique, None)
        on = [recipe for recipe in RECORDS if switch.is_on(settings[recipe])]
        assert recipes == (", ".join(on) or "-"), name
        for recipe in on:
            named = re.findall(r"`([\w.]+)`", keys)
            for key in switch.settings(settings[recipe]):
                group = re.sub(r"quant\.(mlp|bigram|\w+_embedding)\.", "quant.attention.", key)
                assert group in named, f"{name}: {key}"
        assert test.startswith("`tests/"), name


def test_every_recipe_has_its_section():
    sections = re.findall(r"^## `(\w+)`", RECIPES, re.MULTILINE)
    for path in REPOSITORY.glob("configs/*.yaml"):
        assert path.stem in sections, path.stem
