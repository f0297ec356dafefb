"""One training: module, loop, callbacks, distributed processes, evaluation."""
