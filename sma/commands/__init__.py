"""The commands of `sma` that need only the core, one file per subject."""
