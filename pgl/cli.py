"""The command line: ``pgl fit | validate | test | predict | export``, and the tools beside it."""

import argparse
import functools
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import lightning.pytorch as pl
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

import callbacks
import pgl as package
from pgl.artifact.checkpoint_io import GolfCheckpointIO
from pgl.data import TokenDataModule
from pgl.data.sources import DownloadError
from pgl.errors import RunError
from pgl.generate import GenerationConfig, print_continuations
from pgl.module import GolfModule, check_format
from pgl.tools import EPILOG, exit_with, run_tool
from pgl.trainer import GolfTrainer

# In the order in which they act at the end of training: stop the clock, settle the averages,
# export them, score everything, report.
CALLBACKS = {
    "budget": callbacks.WallClockBudget,
    "ranks": callbacks.RankWatch,
    "qat": callbacks.QuantizationAwareTraining,
    "averaging": callbacks.WeightAveraging,
    "metrics": callbacks.TrainingMetrics,
    "divergence": callbacks.DivergenceGuard,
    "artifact": callbacks.GPTQExport,
    "validation": callbacks.SlidingWindowBPB,
    "ttt": callbacks.TestTimeTraining,
    "report": callbacks.RunReport,
    "checkpoint": callbacks.RunCheckpoint,
    "random_state": callbacks.RandomState,
    "progress": callbacks.BudgetProgress,
}

# Errors whose text is made for the user, wherever they come from.
ALWAYS_THE_USERS = (MisconfigurationException, DownloadError, RunError)

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    # no_grad throughout, so that validation and the final scoring share their compiled graphs.
    "inference_mode": False,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 10,
    "logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "checkpoints", "name": "run", "default_hp_metric": False},
    },
}


class GolfParser(LightningArgumentParser):
    """A parser whose errors are one line, and that takes no abbreviation for an option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        exit_with(message)


class GolfCLI(LightningCLI):
    """LightningCLI for a GolfModule, a TokenDataModule and the callbacks of a run.

    Every callback of a run has a key of its own (``budget.seconds``, ``averaging.ema.decay``), so
    that configuration files merge key by key; lists of callbacks would replace each other.
    Precedence, weakest first: defaults, the hyperparameters saved in ``ckpt_path`` (given on the
    command line or in a file), configuration files in their order, the command line.
    """

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"data.source": {"class_path": "pgl.data.Stdlib"}})
        parser.add_class_arguments(GenerationConfig, "generation")

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "datamodule", "train_dataloaders", "val_dataloaders", "weights_only"},
            "validate": {"model", "datamodule", "dataloaders", "weights_only", "verbose"},
            "test": {"model", "datamodule", "dataloaders", "weights_only", "verbose"},
            "predict": {"model", "datamodule", "dataloaders", "weights_only", "return_predictions"},
            "export": {"model", "datamodule"},
        }

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        arguments = sys.argv[1:] if args is None else args
        if isinstance(arguments, list):
            arguments = with_saved_hyperparameters(arguments)
        self.config = (
            parser.parse_args(arguments)
            if isinstance(arguments, list)
            else parser.parse_object(arguments)
        )
        self._check_values()

    def _check_values(self) -> None:
        """Refuse values that no type rules out, and that would strike far from their setting."""
        subcommand = self.config.get("subcommand")  # none with run=False
        config = self.config if subcommand is None else self.config[subcommand]
        for key, value in _leaves(config.as_dict()):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} is {value}: give a finite number")
        if config.get("ckpt_path") == "":
            raise ValueError("ckpt_path is empty: give a file, or leave it out")
        seed = config.get("seed_everything")
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")
        for name, most in (("log_every_n_steps", math.inf), ("num_nodes", 1024)):
            value = config.get(f"trainer.{name}")
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"trainer.{name} must be from 1 to {most}")
        for name in ("min_epochs", "min_steps"):
            # Lightning would go on without an end, since it would not let the budget stop it.
            if config.get(f"trainer.{name}") is not None:
                raise ValueError(
                    f"trainer.{name} is not for a run on a budget: leave it out and set "
                    "budget.seconds or budget.steps"
                )

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning lets the checkpoint's hyperparameters override the command line here. Ours were
        # put in front of the configuration files, in parse_arguments.
        pass

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        plugins = self._get(self.config_init, "trainer").plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        try:
            return super().instantiate_trainer(plugins=[*plugins, GolfCheckpointIO()], **kwargs)
        except (TypeError, ValueError, MemoryError) as error:
            # The budget and the data have been checked: what is left are Lightning's own settings.
            said = str(error) or "trainer.devices is too large"
            raise MisconfigurationException(f"the trainer's settings: {said}") from error

    def before_validate(self) -> None:
        """Refuse to score a model that was never trained."""
        if self._get(self.config, "ckpt_path") is None:
            raise ValueError(
                f"pgl {self.subcommand} needs --ckpt_path: a checkpoint or an artifact"
            )

    before_test = before_validate

    def before_predict(self) -> None:
        """Hand the prompt to the data."""
        self.before_validate()
        generation = self._get(self.config_init, "generation")
        self.datamodule.set_prompts([generation.prompt])
        self.model.generation = generation

    def predict(self, **kwargs: Any) -> None:
        """Continue the prompt and print the result, once however many devices there are."""
        texts = self.trainer.predict(**kwargs, return_predictions=True)
        if self.trainer.is_global_zero:
            print_continuations(texts)


def _leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each single value of nested dictionaries and lists with its dotted key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _leaves(value, key)
    else:
        yield key, values


def with_saved_hyperparameters(arguments: list[str]) -> list[str]:
    """Put the hyperparameters of ``ckpt_path`` in front, as the weakest configuration file.

    Args:
        arguments: Command line: a subcommand and its options.

    Raises:
        ValueError: If the file has no hyperparameters of a GolfModule.
    """
    position = _subcommand_position(arguments)
    if position is None:
        return arguments
    path = _checkpoint_path(arguments, position)
    if path is None or not os.path.isfile(path):
        return arguments
    config = {arguments[position]: {"model": _saved_hyperparameters(path)}}
    # Before the subcommand: there may be configuration files even there.
    return ["--config", yaml.safe_dump(config), *arguments]


def _saved_hyperparameters(path: str) -> dict[str, Any]:
    checkpoint = GolfCheckpointIO().load_checkpoint(path, map_location="cpu")
    if isinstance(checkpoint, dict):
        check_format(checkpoint)
    saved = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(saved, dict) or not isinstance(saved.get("gpt"), dict):
        raise ValueError(
            f"ckpt_path {path} is not a checkpoint of pgl: it lacks the model's hyperparameters; "
            "give a last.ckpt or an artifact"
        )
    # What belongs to the machine that wrote the file, not to the model, stays behind.
    machine = ("attention_backend", "kernels")
    gpt = {name: value for name, value in saved["gpt"].items() if name not in machine}
    kept = {name: saved[name] for name in saved if name not in ("_instantiator", "compile")}
    return {**kept, "gpt": gpt}


def _subcommand_position(arguments: list[str]) -> int | None:
    subcommands = GolfCLI.subcommands()
    for index, argument in enumerate(arguments):
        is_value = index > 0 and arguments[index - 1] in ("-c", "--config")
        if argument in subcommands and not is_value:
            return index
    return None


def _checkpoint_path(arguments: list[str], position: int) -> str | None:
    """Return the ``ckpt_path`` that wins: the last one, in a configuration file or by itself."""
    subcommand = arguments[position]
    path = None
    for config in _given(arguments[:position]):
        section = config.get(subcommand)
        path = section.get("ckpt_path", path) if isinstance(section, dict) else path
    for config in _given(arguments[position + 1 :]):
        path = config.get("ckpt_path", path)
    return None if path is None else str(path)


def _given(options: list[str]) -> list[dict[str, Any]]:
    """Return the contents of ``--config`` and ``--ckpt_path`` options in their order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", dest="given", action="append", type=_read_config)
    parser.add_argument(
        "--ckpt_path", dest="given", action="append", type=lambda path: {"ckpt_path": path}
    )
    try:
        return parser.parse_known_args(options)[0].given or []
    except argparse.ArgumentError:
        return []  # an option without its value: the real parser says so


def _read_config(config: str) -> dict[str, Any]:
    """Return a configuration given as a file or as text; empty if the parser will refuse it."""
    try:
        text = Path(config).read_text() if os.path.isfile(config) else config
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def main(arguments: Sequence[str] | None = None, cli_class: type[GolfCLI] = GolfCLI) -> None:
    """Run the command line; mistakes of the user end with one line and exit status 2."""
    run_tool(arguments)
    # Lightning's own call, which torch 2.13 deprecates: nothing that a user could change.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    try:
        with _fields_explained(sys.argv[1:] if arguments is None else arguments):
            cli_class(
                GolfModule,
                TokenDataModule,
                trainer_class=GolfTrainer,
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=1337,
                parser_class=GolfParser,
                parser_kwargs={"epilog": EPILOG},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                save_config_kwargs={"overwrite": True},
                args=None if arguments is None else list(arguments),
            )
    except (ValueError, FileNotFoundError, *ALWAYS_THE_USERS) as error:
        mistake = _users_mistake(error)
        if mistake is None:
            raise
        notes = [*getattr(mistake, "__notes__", []), *getattr(error, "__notes__", [])]
        exit_with(" ".join([str(mistake), *dict.fromkeys(notes)]))


@contextmanager
def _fields_explained(arguments: Sequence[str]) -> Iterator[None]:
    """Have --help show the docstrings of configuration fields; nothing else waits for them."""
    names = (argument.split("=")[0] for argument in arguments)
    if not any(name == "-h" or re.fullmatch(r"--(.+\.)?help", name) for name in names):
        yield
        return
    read = docstring_parser.parse_from_object
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # The parsers of five subcommands ask for the same classes: 1 s instead of 4.
    docstring_parser.parse_from_object = functools.cache(read)
    try:
        yield
    finally:
        docstring_parser.parse_from_object = read
        set_parsing_settings(docstring_parse_attribute_docstrings=False)


def _users_mistake(error: BaseException | None) -> BaseException | None:
    """Return the error that is a sentence for the user; None where there is a bug instead."""
    if error is None or isinstance(error, ALWAYS_THE_USERS):
        return error
    # Our own checks raise ValueError with a sentence for the user; one that torch raises is a bug.
    # jsonargparse wraps what a check of ours said about a setting that may be null.
    frames = traceback.extract_tb(error.__traceback__)
    ours = {Path(package.__file__).parent, Path(callbacks.__file__).parent}
    if any(folder in Path(frames[-1].filename).parents for folder in ours):
        return error
    return _users_mistake(error.__cause__) if isinstance(error, ValueError) else None


if __name__ == "__main__":
    main()
