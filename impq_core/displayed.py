"""The base of results that show themselves in notebooks. What they show is made in ``impq_core.display``."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Displayed:
    """A result with a table, a data frame and a figure. pandas and matplotlib are imported when one is asked for."""

    def _repr_html_(self) -> str:
        """What a notebook shows: HTML that loads nothing and is readable in light and dark."""
        html: str = _display("html").html(self)
        return html

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``; units are in the names of its columns (docs/notebooks.md lists them)."""
        return _display("frames").frame(self)

    def plot(self, axes: Any = None) -> Any:
        """Draw a figure.

        Args:
            axes: matplotlib axes to draw on; those of a new figure by default, which pyplot does not know. A notebook
                shows the figure if the axes are the last value of a cell.

        Returns:
            The axes.
        """
        return _display("figures").plot(self, axes)


def _display(module: str) -> Any:
    """A module by its name: it imports the classes that have this base."""
    return import_module(f"impq_core.display.{module}")
