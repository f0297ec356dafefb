"""A sub-module and a router for sparse-modular-activation that compare each token with the previous one."""
