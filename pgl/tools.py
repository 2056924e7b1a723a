"""Subcommands of ``pgl`` that are no Trainer's: found before anything heavy is imported."""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from typing_extensions import override

TOOLS = {
    "report": ("pgl.reporting.command", "tables and plots over runs and seeds"),
    "ablate": ("pgl.ablation.command", "a recipe with each technique off in turn"),
}
"""Module and purpose of each; the module has ``main(arguments) -> exit status``."""

EPILOG = "Without a Trainer: " + "; ".join(
    f"pgl {name} ({purpose})" for name, (_, purpose) in TOOLS.items()
)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that takes no abbreviation for an option."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    @override
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}; see {self.prog} --help")


def run_tool(arguments: Sequence[str] | None = None) -> None:
    """Run the tool that the command line names and exit; return if it names none.

    Args:
        arguments: Command line without the program's name. None: that of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in TOOLS:
        return
    module = importlib.import_module(TOOLS[given[0]][0])
    try:
        status = module.main(given[1:])
    except OSError as error:
        exit_with(str(error))
    except ValueError as error:
        # One that another library raises is a bug, and keeps its traceback.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if Path(__file__).parent not in raised_in.parents:
            raise
        exit_with(str(error))
    sys.exit(status)


def exit_with(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2."""
    sys.stderr.write(f"pgl: error: {' '.join(message.split())}\n")
    sys.exit(2)
