"""Triton's interpreter, which runs the kernels on machines without a GPU."""

import dataclasses
import importlib
import importlib.util
import os
from typing import Any

import torch


def install() -> None:
    """Make Triton interpret all kernels if there is no GPU."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    # Triton reads the variable when it is imported. Child processes, such as compilers, must not inherit it.
    os.environ["TRITON_INTERPRET"] = "1"
    knobs = importlib.import_module("triton.knobs")
    importlib.import_module("triton.language")
    del os.environ["TRITON_INTERPRET"]
    knobs.propagate_env = False
    knobs.runtime.interpret = True
    _quicken(importlib.import_module("triton.runtime.interpreter"))


def _quicken(interpreter: Any) -> None:
    """Disable two features of the interpreter that take half of the time."""
    # The overflow check takes six operators per sum of indices, and the indices are far below 2^31.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # Every launch and every call within it patches some hundred functions of the language; once per launch suffices.
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
