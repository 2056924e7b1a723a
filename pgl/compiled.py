"""torch.compile for functions that a process compiles more than once."""

import types
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)


def compiled_copy(function: F) -> F:
    """Return a compiled copy of a Python function, with a recompile limit of its own.

    Dynamo's limit (8) counts per code object and fullgraph makes it an error: with a code object of
    its own, no model and no stack of matrices can use up the limit of another.
    """
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(copy, dynamic=False, fullgraph=True)
