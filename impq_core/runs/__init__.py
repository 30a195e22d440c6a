"""A run from its configuration to its table, and many runs."""
