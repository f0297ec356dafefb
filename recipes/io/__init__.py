"""Files, archives, downloads, caches and processes, independent of tasks and models."""
