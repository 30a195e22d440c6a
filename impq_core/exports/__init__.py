"""Exports: plans as files that other software loads."""
