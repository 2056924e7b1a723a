"""A model's configuration as plain JSON values, checked on the way back."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import torch

from pgl.artifact.errors import ArtifactError
from pgl.model import GPT, GPTConfig

MAX_SETTING = 1 << 26  # no width, length or count of a model that this format is for is larger
MAX_LIST = 4096


def config_to_dict(config: GPTConfig) -> dict[str, Any]:
    """Return a configuration as JSON values."""
    return dataclasses.asdict(config)


def config_from_dict(fields: object) -> GPTConfig:
    """Build a configuration from JSON values.

    Raises:
        ArtifactError: A setting is unknown, of a wrong type, absurdly large or refused by
            `GPTConfig`. The message has no file name; the caller adds it.
    """
    if not isinstance(fields, Mapping):
        raise ArtifactError("has a model configuration that is not a table of settings")
    types_by_name = typing.get_type_hints(GPTConfig)
    known = {field.name for field in dataclasses.fields(GPTConfig) if field.init}
    for name, value in fields.items():
        if name not in known:
            raise ArtifactError(f'has the unknown model setting "{name:.60}": upgrade pgl')
        if not _fits(value, types_by_name[name]):
            raise ArtifactError(f'has a bad value for the model setting "{name}": {value!r:.60}')
    try:
        return GPTConfig(**fields)
    except (ValueError, TypeError, ArithmeticError, AssertionError) as error:
        raise ArtifactError(f"has an impossible model configuration: {error}") from error


def expected_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the state dict of a model, without allocating it.

    Raises:
        ValueError: The configuration cannot be built.
    """
    with torch.device("meta"):
        model = GPT(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _fits(value: object, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments and not isinstance(value, bool)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is list:
        is_list = isinstance(value, list) and len(value) <= MAX_LIST
        return is_list and all(_fits(item, arguments[0]) for item in value)
    if kind is type(None):
        return value is None
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_SETTING
    assert kind is float, f"GPTConfig has a setting of the unexpected type {kind}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < float("inf")
