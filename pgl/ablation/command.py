"""``pgl ablate``: a recipe with each technique off in turn."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pgl.ablation.runner import Runner, check_records, jobs, locked, shared_record
from pgl.ablation.switches import SWITCHES
from pgl.ablation.trials import ALL, UNCHANGED, Trial, plan_trials, resolve
from pgl.io import atomic_write
from pgl.reporting import group_runs, to_json, to_markdown
from pgl.reporting.compare import require_statistics
from pgl.reporting.read import holds_run, read_run
from pgl.reporting.tables import build
from pgl.tools import OneLineParser

DESCRIPTION = """Runs a recipe unchanged and with each technique off in turn, every trial as its own
`pgl fit`, and compares them. Called again it skips what is finished and goes on with what is not.
Options behind `--` go to every `pgl fit`."""


def parser() -> OneLineParser:
    """Return the parser of ``pgl ablate``."""
    parser = OneLineParser(prog="pgl ablate", description=DESCRIPTION)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a recipe or overlay; give it again to merge several, as with `pgl fit`",
    )
    parser.add_argument(
        "--off",
        nargs="+",
        action="extend",
        default=[],
        metavar="TECHNIQUE",
        help=f"techniques to switch off, each in a trial of its own; {ALL}: every one that the "
        "recipe has on; --list names them",
    )
    parser.add_argument(
        "--trial",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "OPTIONS"),
        help='any other trial: --trial lr "--model.optimizer.matrix_lr 0.03"',
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: the recipe's")
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="run N trials at a time, each on a GPU of its own; without it, one at a time on the "
        "devices that the configuration asks for",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: checkpoints/ablate_RECIPE"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the trials and what they change, run nothing"
    )
    parser.add_argument("--list", action="store_true", help="print the names that --off takes")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run ``pgl ablate``; return 1 if a trial failed, 130 after an interruption, else 0.

    Raises:
        ValueError: For whatever the user can mend, in one sentence.
    """
    arguments = list(arguments)
    own, fit_options = arguments, []
    if "--" in arguments:
        position = arguments.index("--")
        own, fit_options = arguments[:position], arguments[position + 1 :]
    options = parser().parse_args(_keep_options_of_trials(own))
    if options.list:
        print("\n".join(SWITCHES))
        return 0
    if not options.config:
        raise ValueError("pgl ablate needs --config, the recipe whose techniques it switches off")
    if not options.off and not options.trial:
        raise ValueError("pgl ablate needs --off or --trial: there is nothing to compare with")
    devices = _devices(options.gpus)
    recipe_options = [word for file in options.config for word in ("--config", file)]
    if options.gpus is not None:
        recipe_options += ["--trainer.accelerator=gpu", "--trainer.devices=1"]
    recipe_options += fit_options
    free = [(name, text.strip()) for name, text in options.trial]
    trials = plan_trials(recipe_options, options.off, free)
    if options.dry_run:
        _print_plan(trials)
        return 0
    recipe = resolve(recipe_options, "the recipe")
    seeds = options.seeds or [recipe["seed_everything"]]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: a seed is there twice")
    if len(seeds) > 1:
        require_statistics()  # now, not after the training
    out = options.out or Path("checkpoints") / f"ablate_{_recipe_name(recipe, options.config)}"
    return _run(trials, seeds, out, recipe_options, options.config, devices)


def _run(
    trials: Sequence[Trial],
    seeds: Sequence[int],
    out: Path,
    recipe_options: Sequence[str],
    configs: Sequence[str],
    devices: Sequence[str | None],
) -> int:
    record = shared_record(recipe_options, configs)
    planned = jobs(trials, seeds, out)
    with locked(out) as lock:
        check_records(planned, record)
        runner = Runner(recipe_options, record, devices, lock, say=_say)
        interrupted = False
        try:
            runner.run(planned)
        except KeyboardInterrupt:
            interrupted = True
    failures = [f"{failure.job.label} failed: {failure.reason}" for failure in runner.failures]
    _report([job.folder for job in planned if job.folder.is_dir()], out, failures)
    for failure in failures:
        _say(failure)
    if interrupted:
        _say("interrupted: the same command goes on where this one stopped")
        return 130
    return 1 if runner.failures else 0


def _report(folders: Sequence[Path], out: Path, failures: Sequence[str]) -> None:
    started = [folder for folder in folders if holds_run(folder)]
    runs = [read_run(folder) for folder in started]
    groups = group_runs(runs)
    has_baseline = any(group.label == UNCHANGED for group in groups)
    baseline = UNCHANGED if has_baseline else None
    report = build(groups, runs, baseline, remarks=failures)
    text = to_markdown(report)
    for name, content in (("ablation.md", text), ("ablation.json", to_json(report))):
        with atomic_write(out / name) as file:
            file.write(content.encode())
    print(f"\n{text}\nTables in {out}/ablation.md and ablation.json", flush=True)


def _keep_options_of_trials(arguments: list[str]) -> list[str]:
    """Keep argparse from taking the options of a trial ("--model.x=1") for its own."""
    kept = list(arguments)
    for position, argument in enumerate(kept):
        if argument == "--trial" and position + 2 < len(kept):
            kept[position + 2] = f" {kept[position + 2]}"
    return kept


def _devices(gpus: int | None) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each slot."""
    if gpus is None:
        return [None]
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(gpus)] if visible is None else visible.split(",")
    if gpus > len(names):
        raise ValueError(f"--gpus {gpus}: CUDA_VISIBLE_DEVICES={visible} names only {len(names)}")
    return list(names[:gpus])


def _recipe_name(recipe: dict[str, object], configs: Sequence[str]) -> str:
    name = recipe.get("trainer.logger.init_args.name")
    return str(name) if name else Path(configs[0]).stem


def _print_plan(trials: Sequence[Trial]) -> None:
    for trial in trials:
        changes = ", ".join(f"{key}={value}" for key, value in trial.changes.items())
        print(f"{trial.name}: {changes or 'the recipe'}")


def _say(line: str) -> None:
    sys.stderr.write(f"ablate: {line}\n")
