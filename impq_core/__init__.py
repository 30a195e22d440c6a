"""impq: mixed precision with a plan that knows how layers interact."""
