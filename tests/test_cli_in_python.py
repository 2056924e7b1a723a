"""The command line's class without a subcommand, and what it leaves of other libraries' state."""

from pathlib import Path

import docstring_parser
import pytest
import torch

from pgl.cli import CALLBACKS, TRAINER_DEFAULTS, GolfCLI, GolfParser, main
from pgl.data import TokenDataModule
from pgl.module import GolfModule
from pgl.trainer import GolfTrainer

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TINY = ["--config", str(CONFIGS / "hardware" / "tiny.yaml")]


def without_subcommand(*arguments: str) -> GolfCLI:
    return GolfCLI(
        GolfModule,
        TokenDataModule,
        trainer_class=GolfTrainer,
        trainer_defaults={**TRAINER_DEFAULTS, "logger": False},
        parser_class=GolfParser,
        auto_configure_optimizers=False,
        save_config_callback=None,
        args=[*TINY, *arguments],
        run=False,
    )


def test_without_a_subcommand_everything_is_made_and_nothing_runs():
    cli = without_subcommand("--model.gpt.num_layers=2", "--budget.steps=7")
    assert len(cli.model.gpt.blocks) == 2
    assert cli.trainer.global_step == 0
    callbacks = {type(callback): callback for callback in cli.trainer.callbacks}
    assert set(CALLBACKS.values()) <= set(callbacks)
    assert callbacks[CALLBACKS["budget"]].steps == 7


def test_the_seed_decides_over_the_first_weights():
    tiny = ["--model.gpt.num_layers=2", "--model.gpt.vocab_size=320"]
    first, again, other = (
        without_subcommand(*tiny, f"--seed_everything={seed}").model.gpt.tok_emb.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--model.gpt.rope_base=.inf", "model.gpt.rope_base is inf"),
        ("--seed_everything=-1", "seed_everything must be from 0"),
        ("--trainer.num_nodes=0", "trainer.num_nodes must be from 1"),
        ("--trainer.min_steps=5", "trainer.min_steps is not for a run on a budget"),
    ],
)
def test_without_a_subcommand_bad_values_are_refused(argument, named):
    with pytest.raises(ValueError, match=named):
        without_subcommand(argument)


def test_help_alone_reads_the_docstrings_of_fields(monkeypatch):
    asked = []

    def read(component, *arguments, **settings):
        asked.append(component)
        return docstring_parser.parse(component.__doc__)

    monkeypatch.setattr(docstring_parser, "parse_from_object", read)
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    # Once each, though there are five subcommands; and it is left as it was.
    assert len(asked) == len(set(asked)) > 20
    assert docstring_parser.parse_from_object is read
    asked.clear()
    with pytest.raises(SystemExit):
        main(["fit", *TINY, "--print_config"])
    assert not asked
