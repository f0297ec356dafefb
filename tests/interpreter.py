"""Triton's interpreter, which runs the kernels where there is no GPU."""

import dataclasses
import importlib
import importlib.util
import os
from typing import Any

import torch


def install() -> None:
    """Have kernels interpreted from now on if there is no GPU."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    # The import of triton chooses. The processes that tests start, such as compilers, must not see the variable.
    os.environ["TRITON_INTERPRET"] = "1"
    knobs = importlib.import_module("triton.knobs")
    importlib.import_module("triton.language")
    del os.environ["TRITON_INTERPRET"]
    knobs.propagate_env = False
    knobs.runtime.interpret = True
    _quicken(importlib.import_module("triton.runtime.interpreter"))


def _quicken(interpreter: Any) -> None:
    """Leave out two things that take half of the time."""
    # Six operators for every sum of indices, which have fewer than 32 bits by far.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # A launch replaces some hundred functions of the language, and every call within it would do so again.
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    done: set[str] = set()

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        if function.__module__ in done:
            return None
        done.add(function.__module__)
        return patch(function)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = patch_once
