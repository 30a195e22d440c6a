"""Surrogates fitted to the losses of an earlier run, and validated, without the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.feasible_costs import feasible
from impq_core.parts import assign_options, build_part
from impq_core.plugins import Plugins
from impq_core.runs.folder import RunFolder
from impq_core.types import SensitivityEstimate
from impq_core.validation import HigherOrder, Validation, higher_order_share, validate


@dataclass(frozen=True, eq=False)
class Fitted:
    """A surrogate fitted to a run's measurements.

    Args:
        surrogate: its name.
        file: of the estimate.
        estimate, validation: None if the surrogate cannot be fitted.
        problem: the reason.
    """

    surrogate: str
    file: Path
    estimate: SensitivityEstimate | None = None
    validation: Validation | None = None
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Fits:
    """The fits of a run.

    Args:
        game: the share of the loss's variance that no additive model explains; NaN if there are too few losses.
        surrogates: one fit for each surrogate.
    """

    game: HigherOrder
    surrogates: list[Fitted]


def fit_run(run: str, names: Sequence[str], pairs: dict[str, str], plugins: Plugins) -> Fits:
    """Fit surrogates to the losses of a run; each estimate is written to RUN/fits/NAME.npz.

    Args:
        run: a run folder.
        names: of surrogates; all if empty.
        pairs: options as on the command line.
        plugins: the source of the surrogates.

    Raises:
        ImpqError: the run has no measurements, none of the surrogates can be fitted, or a name or option is wrong.
    """
    folder = RunFolder.open(run)
    measurements, config = folder.read_measurements(), folder.read_config()
    built = []
    for name in names or plugins.names("surrogate"):
        options = config.options.get("surrogate", {}) if name == config.surrogate else {}
        chosen = RunConfig(surrogate=name, options={"surrogate": options})
        if pairs:
            chosen = replace(chosen, options=assign_options(chosen, plugins, pairs))
        built.append((name, build_part(chosen, plugins, "surrogate")))
    try:
        game = higher_order_share(measurements)
    except ImpqError:  # losses that are not finite: every surrogate reports it
        game = HigherOrder(math.nan, math.nan)
    fitted = []
    for name, surrogate in built:
        file = folder.path / "fits" / f"{name}.npz"
        try:
            estimate = feasible(surrogate.fit(measurements))  # as a run would use it
            validation = validate(surrogate.fit, measurements)
        except ImpqError as error:
            fitted.append(Fitted(name, file, problem=str(error)))
            continue
        file.parent.mkdir(exist_ok=True)
        estimate.save(file)
        fitted.append(Fitted(name, file, estimate, validation))
    if all(fit.problem for fit in fitted):
        raise ImpqError(f"no surrogate can be fitted to the losses of {run}: {fitted[0].problem}")
    return Fits(game, fitted)
