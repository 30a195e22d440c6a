"""Plans as files that other software loads."""
