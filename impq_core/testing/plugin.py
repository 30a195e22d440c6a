"""What a package of parts must do as a whole."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import ClassVar

from impq_core.parts import BASES, describe_options
from impq_core.plugins import GROUP, Plugins
from impq_core.testing.part import Suite


class PluginSuite(Suite):
    """A plugin: hooks that impq knows, offers that load, names that are free.

    Class attributes:
        plugin: the module with the hooks, which the entry point names.
    """

    plugin: ClassVar[ModuleType]

    def found(self) -> Plugins:
        """The plugin alone, as impq finds it."""
        return Plugins(entry_points=[EntryPoint("plugin", self.plugin.__name__, GROUP)])

    def test_it_is_used(self) -> None:
        """Nothing of it is dropped: its hooks are known, and there are some."""
        found = self.found()
        assert not found.dropped, "; ".join(f"{dropped.name}: {dropped.reason}" for dropped in found.dropped)

    def test_every_offer_loads(self) -> None:
        """Targets exist, and are parts of the role they are offered for; their options can be listed."""
        found = self.found()
        for role, name in found.offers:
            part = found.load(role, name, BASES[role])
            assert len(describe_options(found, role, name)) == len(vars(part.Options()))

    def test_every_offer_has_a_summary(self) -> None:
        """One short line for ``impq plugins``."""
        for role, name in (found := self.found()).offers:
            summary = found.find(role, name).summary
            assert summary and "\n" not in summary and len(summary) <= 80, f"{role} '{name}': {summary!r}"

    def test_names_are_free(self) -> None:
        """No other plugin that is installed has taken a name it offers."""
        ours = [EntryPoint("plugin", self.plugin.__name__, GROUP)]
        others = [entry for entry in entry_points(group=GROUP) if entry.value != self.plugin.__name__]
        dropped = Plugins(entry_points=[*others, *ours]).dropped
        taken = [d for d in dropped if "taken" in d.reason]
        assert not taken, "; ".join(f"{d.name}: {d.reason}" for d in taken)
