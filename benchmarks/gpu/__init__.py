"""One run of at most ten minutes that measures the GPU path and compares it with limits; see docs/gpu.md."""
