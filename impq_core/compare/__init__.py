"""Finished runs beside each other: read, grouped, in a table and on a page."""
