"""The shape checker skips combinations that it has checked, and raises for the same calls as jaxtyping."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from tests import shapes

wrong = pytest.raises(jaxtyping.TypeCheckError)


def product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], scale: int = 1, cut: int = 0) -> Float[Tensor, "n m"]:
    """A matrix product; its result has the wrong shape if `cut` is not 0."""
    return scale * (a @ b)[cut:]


def both() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The function with jaxtyping's checker, and with ours."""
    ours: Callable[..., Any] = shapes.jaxtyped(typechecker=shapes.check)(product)
    return jaxtyping._decorator.jaxtyped(typechecker=shapes.check)(product), ours


def outcome(function: Callable[..., Any], *args: Any) -> tuple[type, str]:
    try:
        return type(function(*args)), ""
    except Exception as error:
        return type(error), str(error).splitlines()[0]


SIZES = st.tuples(*[st.integers(1, 2)] * 4)


@given(
    calls=st.lists(st.tuples(SIZES, st.sampled_from([1, 2.5, None, "x"]), st.integers(0, 1), st.booleans()), max_size=8)
)
def test_every_sequence_of_calls_has_the_outcome_of_jaxtyping(
    calls: list[tuple[tuple[int, ...], Any, int, bool]],
) -> None:
    theirs, ours = both()
    for (n, k, other, m), scale, cut, whole in calls:
        a, b = torch.ones(n, k, dtype=torch.long if whole else torch.float), torch.ones(other, m)
        assert outcome(ours, a, b, scale, cut) == outcome(theirs, a, b, scale, cut)


def test_a_wrong_result_raises_after_right_results_for_the_same_arguments() -> None:
    lengths = iter([2, 2, 3, 2])

    def drawn(x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return torch.ones(next(lengths))

    ours = shapes.jaxtyped(typechecker=shapes.check)(drawn)
    ours(torch.ones(2))
    ours(torch.ones(2))
    with wrong:
        ours(torch.ones(2))
    assert ours(torch.ones(2)).shape == (2,)


def test_items_of_lists_and_mappings_are_checked() -> None:
    def first(items: list[Tensor], names: dict[str, int]) -> Tensor:
        return items[0]

    ours = shapes.jaxtyped(typechecker=shapes.check)(first)
    ours([torch.ones(1)], {"a": 1})
    for items, names in (([1], {"a": 1}), ([torch.ones(1)], {"a": "b"}), ([torch.ones(1)], {1: 1})):
        with wrong:
            ours(items, names)


def test_items_of_long_lists_are_checked() -> None:
    def count(items: Sequence[int | None], names: dict[str, Any] | list[str]) -> tuple[int, str]:
        return len(items), "" if any(names) else None  # type: ignore[return-value]

    ours = shapes.jaxtyped(typechecker=shapes.check)(count)
    deep = {"a": [{"b": [{}]}]}
    for _ in range(2):
        assert ours([1, None] * 20, deep) == ours((1, None) * 20, ["a"] * 40) == (40, "")
        for items, names in ((["x"] * 40, deep), ([1] * 40, {1: 2}), ([1], [1] * 40), (1, deep), ([1], {})):
            with wrong:
                ours(items, names)


def test_a_list_that_contains_itself_is_checked_in_every_call() -> None:
    def count(items: list[Any]) -> int:
        return len(items)

    endless: list[Any] = []
    endless.append(endless)
    ours = shapes.jaxtyped(typechecker=shapes.check)(count)
    assert [ours(endless), ours([0] * 1000), ours(endless)] == [1, 1000, 1]
    with wrong:
        ours((0,))


def test_dataclasses_methods_and_properties_are_checked() -> None:
    @shapes.jaxtyped(typechecker=shapes.check)
    @dataclass(frozen=True)
    class Pair:
        a: Float[Tensor, "n"]
        b: Float[Tensor, "n"]

    class Part:
        @shapes.jaxtyped(typechecker=shapes.check)
        @property
        def size(self) -> int:
            return "x"  # type: ignore[return-value]

        @shapes.jaxtyped(typechecker=shapes.check)
        @staticmethod
        def twice(x: int) -> int:
            return 2 * x

        @shapes.jaxtyped(typechecker=shapes.check)
        @classmethod
        def make(cls, x: int) -> "Part":
            return cls()

    for _ in range(2):
        Pair(torch.ones(2), torch.ones(2))
        assert Part.twice(2) == 4
        assert type(Part.make(1)) is Part
        for call in (
            lambda: Pair(torch.ones(2), torch.ones(3)),
            lambda: Part().size,
            lambda: Part.twice("x"),
            lambda: Part.make("x"),
        ):
            with wrong:
                call()


def test_users_have_no_checker(as_users_run: None) -> None:
    ours = both()[1]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ours(torch.ones(1, 2), torch.ones(1, 2))


def test_functions_of_one_nested_definition_share_checks_but_run_their_own_code() -> None:
    def scale(factor: Any) -> Callable[..., Any]:
        @shapes.jaxtyped(typechecker=shapes.check)
        def scaled(x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
            return inner(x)[:factor] * factor

        def inner(x: Tensor) -> Tensor:
            return scale(2)(x) / 2 if factor != 2 else x

        return scaled

    for _ in range(2):
        for factor in (2, 3):
            assert torch.equal(scale(factor)(torch.ones(2)), factor * torch.ones(2))
            with wrong:
                scale(factor)(torch.ones(4))
            with wrong:
                scale(factor)(1.0)


def test_sizes_given_by_numeric_arguments_are_checked() -> None:
    def cut(x: Float[Tensor, "n"], size: int) -> Float[Tensor, "{size}"]:
        return x[:2]

    ours = shapes.jaxtyped(typechecker=shapes.check)(cut)
    ours(torch.ones(3), 2)
    with wrong:
        ours(torch.ones(3), 3)


def test_every_variadic_and_keyword_argument_is_checked() -> None:
    def total(*terms: int, **named: float) -> float:
        return sum(terms) + sum(named.values())

    ours = shapes.jaxtyped(typechecker=shapes.check)(total)
    for _ in range(2):
        for count in (0, 1, 40):
            assert ours(*[1] * count, a=1.0) == count + 1
            for args, kwargs in (([1] * count + ["x"], {}), ([1] * count, {"a": 1.0, "b": "x"})):
                with wrong:
                    ours(*args, **kwargs)


def test_literals_are_checked_by_value_and_unions_by_class() -> None:
    def choose(way: Literal["up", "down"], height: float | None, kinds: tuple[int, ...] | None = None) -> bool | None:
        return None if height is None else height > 0

    ours = shapes.jaxtyped(typechecker=shapes.check)(choose)
    for _ in range(2):
        assert [ours("up", None), ours("down", 1.0), ours("up", 2.0, (1, 2))] == [None, True, True]
        for args in (("left", None), ("up", "x"), ("up", 2.0, ("x", "x"))):
            with wrong:
                ours(*args)
