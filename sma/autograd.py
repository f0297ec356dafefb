"""Support for handwritten gradients, which have no second derivatives."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from sma.errors import InputError


def refuse_second_derivatives(what: str) -> None:
    """Raise an error in a backward pass that is itself differentiated.

    Raises:
        InputError: it is called with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise InputError(
            f"{what} has no second derivatives; differentiate without create_graph=True, or use finite differences"
        )


def first_derivative(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for the `backward` of an `autograd.Function` whose saved tensors carry no graph.

    PyTorch's `once_differentiable` raises in `backward()` only: `autograd.grad(…, inputs)` does not raise, and returns
    second derivatives without the part of this function.

    Args:
        what: name of the operator in the error.

    Raises:
        InputError: the decorated function is called with `create_graph=True`.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def checked(ctx: Any, *gradients: Any) -> Any:
            refuse_second_derivatives(what)
            return backward(ctx, *gradients)

        return checked

    return decorate
