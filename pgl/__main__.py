"""The ``pgl`` command: tools start at once, everything else loads Lightning first."""

from pgl.tools import run_tool


def main() -> None:
    """Run the command line of this process."""
    run_tool()
    from pgl.cli import main as run_trainer

    run_trainer()


if __name__ == "__main__":
    main()
