"""What plugin authors test with: planted games with known answers, and tiny models of real architectures."""

from impq_core.testing.planted import PlantedGame, least_loss, planted_estimate, planted_space
from impq_core.testing.tiny import ARCHITECTURES, tiny_model

__all__ = ["ARCHITECTURES", "PlantedGame", "least_loss", "planted_estimate", "planted_space", "tiny_model"]
