"""The arguments that a model calls its blocks with, compared between two forwards; the hidden states in them, and in
what blocks return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))
"""Types of arguments that hold no state."""


def leaves(positional: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the arguments of a call hold, by path: ``position_embeddings.0`` is the first item of a tuple. A
    container is at its own path too, with its type and length.

    Args:
        positional: positional arguments, the hidden states included.
        named: keyword arguments.
    """
    arguments = {f"argument {place}": value for place, value in enumerate(positional, start=1)}
    return {path: leaf for name, value in {**arguments, **named}.items() for path, leaf in _leaves(name, value)}


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple, set)):
        items = enumerate(value)
    else:
        yield path, value
        return
    yield path, f"{type(value).__name__} of {len(value)}"
    for key, item in items:
        yield from _leaves(f"{path}.{key}", item)


def unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The name of the first argument that differs between two calls, or that holds an object which may have a state (a
    cache); empty if there is none.

    Args:
        first: leaves of one call, as ``leaves`` returns them.
        second: leaves of the other.
    """
    for path in {**first, **second}:
        if path not in first or path not in second or not _alike(first[path], second[path]):
            return path.partition(".")[0]
    return ""


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return isinstance(a, PLAIN) and type(a) is type(b) and bool(a == b)


def hidden_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states in the arguments of a block."""
    return args[0] if args else kwargs.get("hidden_states")


def with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any],
                states: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with other hidden states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def states_in(output: Any) -> torch.Tensor:
    """The hidden states in what a block returns, alone or first in a tuple; raises TypeError if there are none."""
    states = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(states, torch.Tensor):
        raise TypeError("a block returns no hidden states")
    return states
