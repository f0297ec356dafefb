"""Checks of the extras of the distribution that a command needs."""

import sys
from importlib.util import find_spec

from sma.errors import SpecError

DISTRIBUTION = "sparse-modular-activation"
NEEDED = {
    "recipes": ("pydantic_settings", "lightning", "torchmetrics", "matplotlib", "tensorboard"),
    "tune": ("ray", "optuna", "pyarrow", "rich"),
}
"""Packages that the extras install, by the names under which they are imported."""


def missing_extra(subject: str, extra: str, error: ImportError | None = None, package: str = "") -> SpecError:
    """Return the error about a missing extra.

    Args:
        subject: command or part that needs it, such as `sma train`.
        extra: name of the extra, a key of `NEEDED`.
        error: exception of the import.
        package: missing package, if there is no exception.
    """
    name = (error.name or "") if error is not None else package
    lacking = f"its package {name}" if name else "a part of it"
    return SpecError(
        f"{subject} needs the extra {extra!r}, but {lacking} is not installed; "
        f"run: pip install '{DISTRIBUTION}[{extra}]'"
    )


def check_extra(subject: str, extra: str) -> None:
    """Check that an extra is installed, without importing it, which would take seconds.

    Raises:
        SpecError: it is not installed.
    """
    for each in ("recipes", extra) if extra == "tune" else (extra,):
        for package in NEEDED[each]:
            if not _is_there(package):
                raise missing_extra(subject, each if each == extra else extra, package=package)


def require_extra(extra: str) -> None:
    """Exit with one message and status 2 if an extra is not installed: for the first line of a program, before its
    imports.
    """
    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec is not None else f"python {sys.argv[0]}"
    try:
        check_extra(program, extra)
    except SpecError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def of_an_extra(error: ImportError) -> bool:
    """Whether an import failed because of a missing extra, not because of an error in this project."""
    return (error.name or "").partition(".")[0] in {name for names in NEEDED.values() for name in names}


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # blocked, or partly removed
        return False
