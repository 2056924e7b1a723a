"""Errors of a run that are nobody's bug; their text is one sentence for the user."""


class RunError(RuntimeError):
    """A run cannot go on because of its numbers, its disk or its other processes."""


class DivergenceError(RunError):
    """The loss or the gradient of a step is not finite."""


class DiskError(RunError, OSError):
    """A file cannot be written: no space, no permission, or no such folder."""


class RankError(RunError):
    """A process of the run died, hangs, or runs something else than the others."""
