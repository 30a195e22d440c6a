"""The game on a real model."""
