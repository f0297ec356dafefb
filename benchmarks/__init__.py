"""Benchmarks; each prints JSON or a table. Compare figures within one run only."""
