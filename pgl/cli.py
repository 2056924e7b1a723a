"""The command line: ``pgl fit | validate | test | predict | export``."""

import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import callbacks
import pgl as package
from pgl.artifact.checkpoint_io import GolfCheckpointIO
from pgl.data import TokenDataModule
from pgl.generate import GenerationConfig, print_continuations
from pgl.module import GolfModule
from pgl.trainer import GolfTrainer

# In the order in which they act at the end of training: stop the clock, settle the averages,
# export them, score everything, report.
CALLBACKS = {
    "budget": callbacks.WallClockBudget,
    "averaging": callbacks.WeightAveraging,
    "metrics": callbacks.TrainingMetrics,
    "artifact": callbacks.GPTQExport,
    "validation": callbacks.SlidingWindowBPB,
    "report": callbacks.RunReport,
    "checkpoint": callbacks.RunCheckpoint,
    "random_state": callbacks.RandomState,
    "progress": callbacks.BudgetProgress,
}

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
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
        _exit_with(message)


class GolfCLI(LightningCLI):
    """LightningCLI for a GolfModule, a TokenDataModule and the callbacks of a run.

    Every callback of a run has a key of its own (``budget.seconds``, ``averaging.ema.decay``), so
    that configuration files merge key by key; lists of callbacks would replace each other.
    Precedence, weakest first: defaults, the hyperparameters saved in ``--ckpt_path``, configuration
    files in their order, the command line.
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

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning lets the checkpoint's hyperparameters override the command line here. Ours were
        # put in front of the configuration files, in parse_arguments.
        pass

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        plugins = self._get(self.config_init, "trainer").plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        return super().instantiate_trainer(plugins=[*plugins, GolfCheckpointIO()], **kwargs)

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
        """Continue the prompt and print the result."""
        print_continuations(self.trainer.predict(**kwargs, return_predictions=True))


def with_saved_hyperparameters(arguments: list[str]) -> list[str]:
    """Put the hyperparameters of ``--ckpt_path`` in front, as the weakest configuration file.

    Args:
        arguments: Command line: a subcommand and its options.
    """
    path = _option(arguments, "--ckpt_path")
    if path is None or not Path(path).is_file() or len(arguments) < 2:
        return arguments
    saved = dict(GolfCheckpointIO().load_checkpoint(path, map_location="cpu")["hyper_parameters"])
    saved.pop("_instantiator", None)
    saved.pop("compile", None)  # a property of the machine, not of the model
    config = yaml.safe_dump({"model": saved})
    return [arguments[0], "--config", config, *arguments[1:]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; mistakes of the user end with one line and exit status 2."""
    # Lightning's own call, which torch 2.13 deprecates: nothing that a user could change.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    try:
        GolfCLI(
            GolfModule,
            TokenDataModule,
            trainer_class=GolfTrainer,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1337,
            parser_class=GolfParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            args=None if arguments is None else list(arguments),
        )
    except (ValueError, FileNotFoundError) as error:
        if not _is_users_mistake(error):
            raise
        _exit_with(str(error))


def _is_users_mistake(error: Exception) -> bool:
    # Our own checks raise ValueError with a sentence for the user; one that torch raises is a bug.
    frames = traceback.extract_tb(error.__traceback__)
    ours = {Path(package.__file__).parent, Path(callbacks.__file__).parent}
    return any(folder in Path(frames[-1].filename).parents for folder in ours)


def _exit_with(message: str) -> NoReturn:
    sys.stderr.write(f"pgl: error: {' '.join(message.split())}\n")
    sys.exit(2)


def _option(arguments: list[str], name: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return None


if __name__ == "__main__":
    main()
