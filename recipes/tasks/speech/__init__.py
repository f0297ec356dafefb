"""Raw speech: one-second clips of ten words, sample by sample."""
