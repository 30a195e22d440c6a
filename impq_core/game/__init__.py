"""The game and the probe of a real model."""
