"""Runs: from a configuration to a table, resumed, swept, and planned again."""
