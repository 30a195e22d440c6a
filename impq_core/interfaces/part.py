"""What all parts share: options, and the check of what their methods return."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from impq_core.errors import ImpqError, InvalidArrays
from impq_core.space import SearchSpace


@dataclass(frozen=True)
class NoOptions:
    """The options of a part that has none."""


class InputFile(str):
    """Type of an option that names a file the part reads; empty for none.

    The path is made absolute when the options are built, so that a run can be resumed from any folder, and the file's
    digest is part of the run's identity.
    """


NO_FILE = InputFile()
"""Default of an option that names no file."""


def _checked(method: Callable[..., Any], returns: tuple[type, ...]) -> Callable[..., Any]:
    """A wrapper of a method that raises ImpqError if the result is of none of the types, or if the method raises
    InvalidArrays."""
    name = f"{method.__module__}.{method.__qualname__}"

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            result = method(*args, **kwargs)
        except InvalidArrays as error:
            raise ImpqError(f"{name} built an invalid result: {error}") from error
        if not isinstance(result, returns):
            expected = " or ".join(kind.__name__ for kind in returns)
            raise ImpqError(f"{name} returned {type(result).__name__}, not {expected}: this is a bug of that plugin")
        return result

    return checked


def _checked_items(method: Callable[..., Iterable[Any]], kinds: tuple[type, ...]) -> Callable[..., Iterator[Any]]:
    """A wrapper of a method that yields tuples. It raises ImpqError if an item is not a tuple of these types."""
    name = f"{method.__module__}.{method.__qualname__}"

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for item in method(*args, **kwargs):
            found = tuple(type(part) for part in item) if isinstance(item, tuple) else (type(item),)
            if len(found) != len(kinds) or not all(map(issubclass, found, kinds)):
                shown, expected = (", ".join(kind.__name__ for kind in types) for types in (found, kinds))
                raise ImpqError(f"{name} yielded {shown}, not ({expected}): this is a bug of that plugin")
            yield item

    return checked


class Part:
    """Base class of all pluggable parts: it holds the options, and checks the types that the methods return.

    Class attributes:
        Options: a frozen dataclass.
        returns: the return types of the role's methods, by method name.
        yields: the types in the tuples that the role's generators yield, by method name.
    """

    Options: ClassVar[type] = NoOptions
    returns: ClassVar[Mapping[str, tuple[type, ...]]] = MappingProxyType({})
    yields: ClassVar[Mapping[str, tuple[type, ...]]] = MappingProxyType({})

    def __init_subclass__(cls, **more: Any) -> None:
        """Wraps the methods in ``returns`` and ``yields``, so that a wrong type is reported at the method."""
        super().__init_subclass__(**more)
        for name, kinds in cls.returns.items():
            if name in vars(cls):
                setattr(cls, name, _checked(vars(cls)[name], kinds))
        for name, kinds in cls.yields.items():
            if name in vars(cls):
                setattr(cls, name, _checked_items(vars(cls)[name], kinds))

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    def check_space(self, space: SearchSpace) -> None:
        """Called before any weight is loaded; raises ImpqError if the options do not fit the space."""
