"""Surrogates: models fitted to measured losses, which predict the losses of other picks."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_surrogates() -> list[Component]:
    """``covariance``, ``additive``, ``regression``, ``coverage``, ``auto``."""
    return [
        Component("covariance", "impq_surrogates.shapley:Covariance",
                  "Shapley values and the shrunk covariance of marginals (the paper)"),
        Component("additive", "impq_surrogates.shapley:Additive", "Shapley values alone"),
        Component("regression", "impq_surrogates.regression:Regression",
                  "cross-validated ridge regression on width steps and their products, with a link"),
        Component("auto", "impq_surrogates.auto:Auto", "additive, coverage or regression, chosen by cross-validation"),
        Component("coverage", "impq_surrogates.regression:Coverage", "losses that saturate at a fitted ceiling"),
    ]
