"""What an ablation runs: the recipe unchanged, without each technique, and freely chosen trials."""

import functools
import io
import json
import re
import shlex
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import yaml
from typing_extensions import override

from pgl.ablation.switches import SWITCHES, Settings, switch
from pgl.reporting.compare import flatten

UNCHANGED = "unchanged"
ALL = "all"


@dataclass(frozen=True)
class Trial:
    """One variant of the recipe."""

    name: str
    """What its folder and its row of the table are called."""
    options: tuple[str, ...]
    """Command-line options that make it, behind those of the recipe."""
    changes: Settings
    """Keys and values in which its configuration differs from the recipe's."""


def plan_trials(
    recipe_options: Sequence[str],
    techniques_off: Sequence[str] = (),
    free_trials: Sequence[tuple[str, str]] = (),
) -> list[Trial]:
    """Return the trials, the unchanged recipe first, after parsing the configuration of each.

    Args:
        recipe_options: Options of ``pgl fit`` that make the recipe.
        techniques_off: Names of switches; "all" stands for every one that the recipe has on.
        free_trials: Names and options, such as ``("lr", "--model.optimizer.matrix_lr 0.03")``.

    Raises:
        ValueError: If a technique is unknown or not on, if a trial changes nothing or cannot be
            parsed, or if two trials have the same name.
    """
    recipe = resolve(recipe_options, "the recipe")
    variants = [
        (f"no_{name}", off_options(name, recipe)) for name in _chosen(techniques_off, recipe)
    ]
    variants += [(name, _split(name, text)) for name, text in free_trials]
    trials = [Trial(UNCHANGED, (), {})]
    for name, options in variants:
        _check_name(name, [trial.name for trial in trials])
        config = resolve([*recipe_options, *options], f"trial {name}")
        # A section that is switched off turns up as one key that is null.
        changes = {k: v for k, v in config.items() if k not in recipe or recipe[k] != v}
        if not changes:
            raise ValueError(f"trial {name} changes nothing of the recipe: leave it out")
        trials.append(Trial(name, tuple(options), changes))
    return trials


def off_options(name: str, recipe: Settings) -> list[str]:
    """Return the options that switch a technique off.

    Raises:
        ValueError: If the technique is unknown, or the recipe does not have it on.
    """
    options = []
    for key, value in switch(name).settings(recipe).items():
        options += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return options


def resolve(options: Sequence[str], what: str) -> Settings:
    """Return the configuration that ``pgl fit`` makes of ``options``, with dotted keys.

    Args:
        options: Options of ``pgl fit``.
        what: What they are, for messages.

    Raises:
        ValueError: If ``pgl fit`` refuses them, in its own words.
    """
    printed, complaint = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(complaint):
            _parser().parse_args(["fit", *options, "--print_config"])
    except SystemExit as end:
        if end.code:
            said = complaint.getvalue().rpartition("pgl: error: ")[2].strip()
            raise ValueError(f"{what}: {said}") from end
    return flatten(yaml.safe_load(printed.getvalue()))


@functools.cache
def _parser() -> Any:
    """Return the parser of ``pgl``, which takes longer to make than to use."""
    # Only now, as it takes seconds: whoever asks for help does not need it.
    from pgl import cli

    made = []

    class ParserOnly(cli.GolfCLI):
        @override
        def parse_arguments(self, parser: Any, args: Any) -> None:
            made.append(parser)
            raise _ParserMade

    with suppress(_ParserMade):
        cli.main([], ParserOnly)
    return made[0]


class _ParserMade(Exception):
    """Nothing else of the command line is wanted."""


def _chosen(names: Sequence[str], recipe: Settings) -> list[str]:
    if ALL not in names:
        return list(names)
    if len(names) > 1:
        raise ValueError(f"--off {ALL} stands for every technique: give no other name beside it")
    return [name for name, each in SWITCHES.items() if each.is_on(recipe)]


def _split(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"trial {name}: its options cannot be read ({error}): {text}") from error


def _check_name(name: str, taken: Sequence[str]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise ValueError(
            f"trial {name!r}: a name is made of letters, digits, '_', '-', '+' and '.', as it "
            "becomes a folder"
        )
    if name in taken:
        raise ValueError(f"trial {name} is there twice: give each a name of its own")
