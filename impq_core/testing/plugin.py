"""Tests of a plugin as a whole."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import ClassVar

from impq_core.descriptions import described_options
from impq_core.parts import BASES
from impq_core.plugins import GROUP, Plugins
from impq_core.testing.part import Suite


class PluginSuite(Suite):
    """Tests that impq accepts a plugin: its hooks exist, its components load, and their names are free.

    Class attributes:
        plugin: the module of the entry point, with the hooks.
    """

    plugin: ClassVar[ModuleType]

    def load(self) -> Plugins:
        """The registry of this plugin alone."""
        return Plugins(entry_points=[EntryPoint("plugin", self.plugin.__name__, GROUP)])

    def test_it_is_used(self) -> None:
        """impq drops no part of the plugin: it has hooks, and all of them exist."""
        dropped = self.load().dropped
        assert not dropped, "; ".join(f"{entry.name}: {entry.reason}" for entry in dropped)

    def test_every_offer_loads(self) -> None:
        """The target of every component exists and is a part of its role; its options can be listed."""
        plugins = self.load()
        for role, name in plugins.offers:
            part = plugins.load(role, name, BASES[role])
            assert len(described_options(plugins, role, name)) == len(vars(part.Options()))

    def test_every_offer_has_a_summary(self) -> None:
        """Every component has a summary of one short line for ``impq plugins``."""
        for role, name in (plugins := self.load()).offers:
            summary = plugins.find(role, name).summary
            assert summary and "\n" not in summary and len(summary) <= 80, f"{role} '{name}': {summary!r}"

    def test_names_are_free(self) -> None:
        """No other installed plugin has a component of the same role and name."""
        ours = [EntryPoint("plugin", self.plugin.__name__, GROUP)]
        others = [entry for entry in entry_points(group=GROUP) if entry.value != self.plugin.__name__]
        dropped = Plugins(entry_points=[*others, *ours]).dropped
        conflicts = [entry for entry in dropped if "taken" in entry.reason]
        assert not conflicts, "; ".join(f"{entry.name}: {entry.reason}" for entry in conflicts)
