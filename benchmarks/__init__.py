"""Measurements: each prints JSON or a table, ratios within one run."""
