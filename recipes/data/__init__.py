"""Data sets: generators and loaders of the real formats."""
