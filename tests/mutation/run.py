"""Mutation check: does some test fail for each of the mistakes in ``mutants.py``?

``make mutation``, or ``python tests/mutation/run.py [--jobs 2] [--only pgl/quant]``. The working
tree is copied and left alone; each job has a copy of its own.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutants import Mutant, mutants  # noqa: E402

COPIED = ("pgl", "callbacks", "tests", "configs", "setup.cfg", "pyproject.toml")
LIMIT_SECONDS = 180
"""A mutant that loops for ever is noticed too."""


def copy_of_the_tree(folder: Path) -> Path:
    """Copy what the tests need; bytecode stays behind, since it could be taken for fresh."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def tests_pass(copy: Path, tests: Sequence[str]) -> bool:
    """Run test files of a copy in a forked process, which has Lightning imported already."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setpgrp()
        signal.alarm(LIMIT_SECONDS)
        os._exit(_run_pytest(copy, tests))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1, 2, -signal.SIGALRM):
        raise RuntimeError(f"pytest ended with {code} on {' '.join(tests)}")
    return code == 0


def _run_pytest(copy: Path, tests: Sequence[str]) -> int:
    import pytest

    os.chdir(copy)
    sys.path.insert(0, str(copy))
    import pgl

    if copy not in Path(pgl.__file__ or "").parents:
        return 70  # another installation of pgl would be tested
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def survives(copy: Path, mutant: Mutant) -> bool:
    """Put a mutant into a copy, run its tests and take it out again."""
    path = copy / mutant.path
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.path}: {mutant.old!r} occurs {source.count(mutant.old)} times")
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        return tests_pass(copy, mutant.tests)
    finally:
        path.write_text(source)


def _work(index_and_jobs: tuple[int, int], chosen: list[Mutant], results: str) -> None:
    index, jobs = index_and_jobs
    # Imported before the forks, so that a mutant costs its tests only.
    import lightning.pytorch  # noqa: F401

    with tempfile.TemporaryDirectory() as folder, open(results, "a", buffering=1) as file:
        copy = copy_of_the_tree(Path(folder))
        for number in range(index, len(chosen), jobs):
            began = time.monotonic()
            fate = "survived" if survives(copy, chosen[number]) else "killed"
            file.write(f"{number} {fate} {time.monotonic() - began:.1f}\n")


def main() -> int:
    """Run all mutants and print what became of each file's; exit status 1 under 90 %."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="run mutants of paths that contain this")
    options = parser.parse_args()
    chosen = [mutant for mutant in mutants() if options.only in mutant.path]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("PGL_GOLDEN", str(REPOSITORY.parent / "shared" / "golden"))
    with tempfile.TemporaryDirectory() as folder:
        results = str(Path(folder) / "results")
        _check_baseline(chosen)
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=_work, args=((index, options.jobs), chosen, results))
            for index in range(options.jobs)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            return 2
        return _report(chosen, Path(results))


def _check_baseline(chosen: list[Mutant]) -> None:
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    with tempfile.TemporaryDirectory() as folder:
        if not tests_pass(copy_of_the_tree(Path(folder)), tests):
            raise SystemExit("the tests fail without any mutant: nothing can be measured")


def _report(chosen: list[Mutant], results: Path) -> int:
    fates = {int(line.split()[0]): line.split()[1] for line in results.read_text().splitlines()}
    survivors = [chosen[number] for number in sorted(fates) if fates[number] == "survived"]
    for path in dict.fromkeys(mutant.path for mutant in chosen):
        total = sum(mutant.path == path for mutant in chosen)
        alive = sum(mutant.path == path for mutant in survivors)
        print(f"{path:32} {total - alive:3} of {total:3} killed")
    for mutant in survivors:
        print(f"survived: {mutant.path}: {mutant.old!r} -> {mutant.new!r}")
    killed = len(chosen) - len(survivors)
    print(f"{killed} of {len(chosen)} killed ({killed / len(chosen):.1%})")
    return 0 if killed >= 0.9 * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
