"""The run-time checker of the shapes that signatures promise; `conftest.py` puts it over the whole package."""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintException


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and results by their annotations, or nothing where beartype cannot read one, such as `Self`
    outside a class.
    """
    try:
        return beartype(function)
    except BeartypeDecorHintException:
        return function
