"""Work shared among processes: the same results in the same order, and no process remains."""

import itertools
import multiprocessing
import os
from contextlib import closing

import pytest

from sma.errors import DataError, SpecError
from sma.recipes.io.workers import in_order


def square(number):
    return number * number


def end_process(number):
    os._exit(1)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_results_come_in_order_from_any_number_of_processes(workers, count):
    assert list(in_order(square, range(count), workers=workers)) == [number**2 for number in range(count)]
    assert multiprocessing.active_children() == []


def test_items_are_consumed_lazily_and_closing_ends_the_processes():
    taken = itertools.count()
    with closing(in_order(square, taken, workers=2)) as results:
        assert list(itertools.islice(results, 3)) == [0, 1, 4]
    assert next(taken) <= 3 + 2 * 2 + 1
    assert multiprocessing.active_children() == []


def test_error_of_the_function_is_raised():
    with pytest.raises(TypeError, match="can't multiply sequence"):
        list(in_order(square, ["text"], workers=2))


def test_process_that_dies_gives_an_error_message():
    with pytest.raises(DataError, match="a process that generates data died; with too little memory give workers=1"):
        list(in_order(end_process, range(3), workers=2))


def test_zero_workers_are_refused():
    with pytest.raises(SpecError, match="workers=0 must be at least 1; leave it out to use every core"):
        list(in_order(square, range(3), workers=0))
