"""Conversion of the weights of other implementations."""
