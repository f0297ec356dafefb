"""One run of at most ten minutes that measures the GPU path and compares it with the marks; see docs/gpu.md."""
