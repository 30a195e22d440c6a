"""impq: mixed precision with a plan that knows how layers interact.

From Python: ``impq_core.run(impq_core.RunConfig(model=..., budget="3.0bits"))`` returns a ``RunResult``, and
``impq_core.play`` of the same the game that estimators play.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from impq_core.config import RunConfig, TextConfig

if TYPE_CHECKING:
    from impq_core.pipeline import RunResult, play, run

__all__ = ["RunConfig", "RunResult", "TextConfig", "play", "run"]


def __getattr__(name: str) -> Any:
    if name in ("run", "RunResult", "play"):  # the pipeline imports torch; the command line's help must not
        from impq_core import pipeline

        return getattr(pipeline, name)
    raise AttributeError(name)
