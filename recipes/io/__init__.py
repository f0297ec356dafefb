"""Files, archives, downloads, caches and processes: what tasks and runs stand on. Knows no task and no model."""
