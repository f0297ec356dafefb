"""What changes from one token to the next: a sub-module and a router for sparse-modular-activation."""
