"""Test tools for plugins: suites to inherit, planted games with known answers, and tiny models of real architectures.
The suites need pytest. A failed test names the fault of the part in one line."""

from impq_core.testing.allocators import AllocatorSuite
from impq_core.testing.backends import BackendSuite
from impq_core.testing.estimators import EstimatorSuite
from impq_core.testing.meters import MeterSuite
from impq_core.testing.planted import (
    PlantedGame,
    PlantedProbe,
    best_pick,
    least_loss,
    planted_estimate,
    planted_loss,
    planted_measurements,
    planted_space,
)
from impq_core.testing.plugin import PluginSuite
from impq_core.testing.refiners import RefinerSuite
from impq_core.testing.surrogates import SurrogateSuite
from impq_core.testing.texts import made_text
from impq_core.testing.tiny import ARCHITECTURES, TinyTable, tiny_model

__all__ = ["ARCHITECTURES", "AllocatorSuite", "BackendSuite", "EstimatorSuite", "MeterSuite", "PlantedGame",
           "PlantedProbe", "PluginSuite", "RefinerSuite", "SurrogateSuite", "TinyTable", "best_pick", "least_loss",
           "made_text", "planted_estimate", "planted_loss", "planted_measurements", "planted_space", "tiny_model"]
