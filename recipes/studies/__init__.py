"""Many trainings: variants of one experiment, grids of runs, baselines, and their tables."""
