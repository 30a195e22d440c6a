"""Tests of the contract of ``Part``, for parts of any role, and expected failures of a suite."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import subprocess
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from impq_core.descriptions import described_fields
from impq_core.errors import nearest
from impq_core.interfaces import NoOptions, Part
from impq_core.plugins import PLAIN, build_options

HEAVY = ("mlflow", "torch", "transformers")
"""Modules that take seconds to import."""


class Suite:
    """Tests to inherit: pytest runs them in a derived class with a name that begins with ``Test``.

    Class attributes:
        expected_failures: reasons by the names of tests that this part fails. Such a test is reported if it passes.
    """

    expected_failures: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init_subclass__(cls, **more: Any) -> None:
        """Mark the expected failures; raises TypeError if a name is not that of a test."""
        super().__init_subclass__(**more)
        for name, reason in vars(cls).get("expected_failures", {}).items():
            if not hasattr(cls, name):
                tests = [test for test in dir(cls) if test.startswith("test_")]
                raise TypeError(f"{cls.__name__} expects the failure of '{name}', which is no test of it"
                                f"{nearest(name, tests)}")
            setattr(cls, name, _expected_to_fail(getattr(cls, name), reason))


def _expected_to_fail(test: Callable[..., None], reason: str) -> Callable[..., None]:
    import pytest

    @functools.wraps(test)
    def marked(*args: Any, **kwargs: Any) -> None:
        test(*args, **kwargs)

    xfail: Callable[..., None] = pytest.mark.xfail(reason=reason, strict=True)(marked)
    return xfail


class PartSuite(Suite):
    """Tests of a part of any role.

    Class attributes:
        part: the class under test.
        options: its options, as ``-o name=value`` gives them.
    """

    part: ClassVar[type[Part]]
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def make(self) -> Any:
        """The part with its options, built as ``impq run`` builds it."""
        return self.part(build_options(self.part, "part", self.part.__name__, self.options))

    def test_options_are_described(self) -> None:
        """Options are a frozen dataclass of plain values, each with a default and a description in the docstring's
        Args, as ``impq plugins --options`` and ``-o name=value`` need them."""
        options, module = self.part.Options, importlib.import_module(self.part.__module__)
        assert options is not NoOptions or not hasattr(module, "Options"), (
            f"{module.__name__} has a class Options, but {self.part.__name__} lacks 'Options = Options'")
        assert is_dataclass(options), f"{self.part.__name__}.Options is no dataclass"
        assert options.__dataclass_params__.frozen, f"{options.__name__} is not frozen"  # type: ignore[attr-defined]
        types, defaults = typing.get_type_hints(options), options()
        descriptions = described_fields(options)
        for field in fields(options):
            option = f"option {field.name} of {self.part.__name__}"
            assert types[field.name] in PLAIN, f"{option} is of type {types[field.name]}, which is not plain"
            assert descriptions.get(field.name), f"{option} is missing in the Args of {options.__name__}'s docstring"
            parsed = build_options(self.part, "part", "", {field.name: str(getattr(defaults, field.name))})
            assert parsed == defaults, f"{option}: its default changes if it is given as text"

    def test_nothing_heavy_is_imported_with_it(self) -> None:
        """The part's module imports no heavy library, so that errors on the command line are reported at once."""
        module = self.part.__module__
        if importlib.util.find_spec(module) is None:
            return  # impq loads a single file by its path
        script = (f"import sys; sys.path[:] = {sys.path!r}; import {module}; "
                  f"print(*[name for name in {HEAVY!r} if name in sys.modules])")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not done.stdout.split(), f"{module} imports {done.stdout.strip()}: import it inside the methods"
