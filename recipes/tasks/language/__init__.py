"""Causal language modelling of bytes."""
