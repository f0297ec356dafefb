"""Device programs in Triton. `sma.kernels.operator` imports these files with the first tensor that needs them."""
