"""Discovery of plugins, and the classes and options of parts by name.

Hooks only describe components; ``Plugins.load`` imports the class of a name. A plugin that cannot be used is dropped,
with the reason in ``Plugins.dropped``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import math
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pluggy

from impq_core import hookspecs
from impq_core.errors import ImpqError, UsageError, nearest, one_line
from impq_core.hookspecs import Component
from impq_core.interfaces import InputFile
from impq_core.signals import stoppable, uninterrupted

GROUP = "impq"
_FILE = "impq_file_"
"""The beginning of the module names of plugin files."""

ROLES = ("estimator", "surrogate", "allocator", "backend")
"""The roles that every run fills."""

OFFERED = (*ROLES, "refiner", "exporter", "meter", "crew")
"""Every role whose parts are chosen by name."""


PLAIN = (bool, int, float, str, InputFile)
"""Types that an option can have."""


@dataclass(frozen=True)
class Offer:
    """A component and the plugin that offers it."""

    role: str
    component: Component
    origin: str


@dataclass(frozen=True)
class Dropped:
    """A plugin or a component that is not used, and the reason."""

    name: str
    reason: str


class Plugins:
    """The installed plugins, plugin files and observers.

    Args:
        files: Python files to load as further plugins (``--plugin ./mine.py``).
        entry_points: of plugins; the entry points of group ``impq`` by default.

    Raises:
        UsageError: a file is missing or cannot be loaded (a broken installed plugin is dropped instead).

    Attributes:
        files: the plugin files, absolute.
    """

    def __init__(self, files: Iterable[Path] = (),
                 entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> None:
        given = {Path(file).resolve(): Path(file) for file in files}
        self.files = tuple(given)
        self.offers: dict[tuple[str, str], Offer] = {}
        self.dropped: list[Dropped] = []
        self._manager = pluggy.PluginManager("impq")
        self._manager.add_hookspecs(hookspecs)
        entries = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
        # First-party plugins first, so that no other plugin can take their names; then by name, for a stable order.
        for entry in sorted(entries, key=lambda e: (_distribution(e) != "impq", _distribution(e), e.name)):
            origin = f"{_distribution(entry)}:{entry.name}"
            try:
                self._add(entry.load(), origin)
            except (Exception, SystemExit) as error:
                self.dropped.append(Dropped(origin, one_line(error)))
        for file in given.values():
            try:
                self._add(_load_file(file), str(file))
            except (Exception, SystemExit) as error:
                raise UsageError(f"plugin file {file} cannot be loaded: {one_line(error)}") from error

    def _add(self, plugin: Any, origin: str) -> None:
        """Register a plugin and collect its offers; a plugin that raises is not registered."""
        if self._manager.is_registered(plugin):
            return
        self._manager.register(plugin, origin)
        try:
            known = [name for name in vars(hookspecs) if name.startswith("impq_")]
            callers = self._manager.get_hookcallers(plugin) or []
            if not callers:
                raise ImpqError("it has no hooks: mark its functions with @hookimpl")
            for caller in callers:
                if caller.name not in known:
                    raise ImpqError(f"unknown hook '{caller.name}'{nearest(caller.name, known)}")
            offers = [offer for role in OFFERED for offer in self._offers_of(plugin, origin, role)]
        except BaseException:
            self._manager.unregister(plugin)
            raise
        for offer in offers:
            key = (offer.role, offer.component.name)
            if key in self.offers:
                self.dropped.append(Dropped(f"{offer.role} '{offer.component.name}' of {origin}",
                                            f"the name is taken by {self.offers[key].origin}"))
            else:
                self.offers[key] = offer

    def _offers_of(self, plugin: Any, origin: str, role: str) -> list[Offer]:
        hook = f"impq_{role}s"
        results = self._only(hook, plugin)()
        offers = []
        for result in results:
            if isinstance(result, (str, Component)) or not isinstance(result, Iterable):
                raise ImpqError(f"{hook} returned {type(result).__name__}, not a list of Components")
            for component in result:
                if not isinstance(component, Component) or component.target.count(":") != 1:
                    raise ImpqError(f"{hook} offered {component!r}, which is no Component with a 'module:Class' target")
                offers.append(Offer(role, component, origin))
        return offers

    @property
    def _registered(self) -> list[Any]:
        """The plugins and observers in the order of their registration (pluggy's ``get_plugins`` is a set)."""
        return [plugin for _, plugin in self._manager.list_name_plugin() if plugin is not None]

    def _only(self, hook: str, plugin: Any) -> Callable[..., list[Any]]:
        others = [other for other in self._registered if other is not plugin]
        return self._manager.subset_hook_caller(hook, others)

    def watch(self, observer: object) -> None:
        """Register an observer: an object with hook methods for moments of a run."""
        name = type(observer).__name__
        self._add(observer, f"{name} {len(self._registered)}" if self._manager.has_plugin(name) else name)

    def notify(self, moment: str, **facts: Any) -> None:
        """Call the observers of a moment, in the order of their registration.

        An exception of an observer becomes a warning, and the run continues; SIGINT and SIGTERM are handled after the
        observer has returned.

        Raises:
            ImpqError: an observer refused the start of a run.
        """
        for plugin in self._registered:
            try:
                with uninterrupted():
                    self._only(moment, plugin)(**facts)
            except Exception as error:
                if moment == "impq_run_started" and isinstance(error, ImpqError):
                    raise
                name = self._manager.get_name(plugin)
                warnings.warn(f"observer {name} failed in {moment}: {one_line(error)}", RuntimeWarning, stacklevel=2)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Notify observers of the exception that ends the ``with`` block, if one does; a stop is KeyboardInterrupt."""
        try:
            with stoppable():
                yield
        except BaseException as error:
            self.notify("impq_run_failed", error=error)
            raise

    def commands(self) -> dict[str, Any]:
        """Commands of plugins, by name. The first plugin that offers a name keeps it; a plugin whose commands cannot be
        read is added to ``dropped``."""
        commands: dict[str, Any] = {}
        for plugin in self._registered:
            try:
                offered = [command for commands in self._only("impq_commands", plugin)() for command in commands]
                names = [(str(command.name), command) for command in offered]
            except (Exception, SystemExit) as error:
                self._drop(f"commands of {self._manager.get_name(plugin)}", one_line(error))
                continue
            for name, command in names:
                commands.setdefault(name, command)
        return commands

    def _drop(self, name: str, reason: str) -> None:
        if Dropped(name, reason) not in self.dropped:
            self.dropped.append(Dropped(name, reason))

    def names(self, role: str) -> list[str]:
        """Names of the parts of a role."""
        return [name for offered_role, name in self.offers if offered_role == role]

    def find(self, role: str, name: str) -> Component:
        """The component of that name.

        Raises:
            UsageError: no plugin offers it; the message has the nearest name.
        """
        if (role, name) not in self.offers:
            raise UsageError(f"unknown {role} '{name}'{nearest(name, self.names(role))}")
        return self.offers[role, name].component

    def load(self, role: str, name: str, base: type | tuple[type, ...]) -> type[Any]:
        """The class of a name.

        Raises:
            ImpqError: the class or a library that it needs is missing, or the class is of another role.
        """
        component = self.find(role, name)
        if remedy := component.remedy():
            raise ImpqError(f"{role} '{name}' {remedy}")
        module, _, attribute = component.target.partition(":")
        try:
            target = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ImpqError(f"{role} '{name}' of {self.offers[role, name].origin} cannot be loaded: "
                            f"{one_line(error)}") from error
        if not (isinstance(target, type) and issubclass(target, base)):
            raise ImpqError(f"{role} '{name}' of {self.offers[role, name].origin}: {component.target} is not "
                            f"{'an' if role[0] in 'ae' else 'a'} {role}")
        return target


def option_names(part: type[Any]) -> list[str]:
    """Names of a part's options."""
    return [field.name for field in fields(part.Options)]


def build_options(part: type[Any], role: str, name: str, given: Mapping[str, Any]) -> Any:
    """A part's ``Options`` from text or typed values.

    Raises:
        UsageError: an unknown option (with the nearest), a value of the wrong type, or one the part refuses.
    """
    types = typing.get_type_hints(part.Options)
    values = {}
    for key, value in given.items():
        if key not in types:
            raise UsageError(f"{role} '{name}' has no option '{key}'{nearest(key, types)}")
        if types[key] not in PLAIN:
            raise ImpqError(f"option {key} of {role} '{name}' is of type {types[key]}: this is a bug of that plugin, "
                            "whose options can be bool, int, float, str or InputFile")
        values[key] = _convert(value, types[key], f"option {key} of {role} '{name}'")
    try:
        return part.Options(**values)
    except ValueError as error:
        raise UsageError(f"{role} '{name}': {error}") from error


def _convert(value: Any, kind: type[Any], what: str) -> Any:
    if kind is InputFile and isinstance(value, (str, Path)):
        return InputFile(Path(value).expanduser().absolute() if str(value) else "")
    if kind is bool:
        word = str(value).lower()
        if word in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return word in ("true", "yes", "on", "1")
    else:
        try:
            if not (kind is int and isinstance(value, (bool, float))):
                converted = kind(value)
                if kind is not float or math.isfinite(converted):
                    return converted
        except (TypeError, ValueError, OverflowError):
            pass
    raise UsageError(f"{what} takes {kind.__name__}, not '{value}'")


def responsible(error: BaseException) -> str:
    """The distribution or plugin file of an unexpected error: that of the innermost frame of impq or of a plugin."""
    entries = importlib.metadata.entry_points(group=GROUP)
    owners = {entry.value.partition(".")[0]: _distribution(entry) for entry in entries}
    name, traceback = "impq", error.__traceback__
    while traceback:
        package = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in owners or package == "impq_core":
            name = owners.get(package, "impq")
        elif package.startswith(_FILE):
            name = traceback.tb_frame.f_code.co_filename
        traceback = traceback.tb_next
    return name


def _distribution(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else "?"


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ImpqError("no such file")
    # The name holds a digest of the content: two files of one name are two modules.
    name = f"{_FILE}{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImpqError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that a target names its class by the module
    spec.loader.exec_module(module)
    return module
