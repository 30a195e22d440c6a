"""Surrogates: predictions of the losses of picks that were not measured."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_surrogates() -> list[Component]:
    """``covariance``, ``additive``, ``regression``, ``coverage``, ``auto``."""
    return [
        Component("covariance", "impq_surrogates.shapley:Covariance",
                  "Shapley values and the shrunk covariance of marginals (the paper)"),
        Component("additive", "impq_surrogates.shapley:Additive", "Shapley values alone"),
        Component("regression", "impq_surrogates.regression:Regression",
                  "ridge on widths and their products, cross-validated, with a link"),
        Component("auto", "impq_surrogates.auto:Auto", "additive, coverage or regression, by cross-validation"),
        Component("coverage", "impq_surrogates.regression:Coverage", "saturating product of single damages"),
    ]
