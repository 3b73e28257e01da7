"""The next item is made while the current one is in use."""

from __future__ import annotations

import threading

import pytest

from megatron_stepkto.base.ahead import OneAhead


def test_values_and_order_are_those_of_map() -> None:
    for count in range(5):
        with OneAhead(lambda i: i * i, range(count)) as items:
            assert list(items) == [i * i for i in range(count)]


def test_one_item_is_made_during_the_use_of_another_and_no_more() -> None:
    made: list[int] = []
    finished = [threading.Event() for _ in range(4)]

    def make(item: int) -> int:
        made.append(item)
        finished[item].set()
        return item

    with OneAhead(make, range(4)) as items:
        for item in range(4):
            assert next(items) == item
            last = min(item + 1, 3)
            assert finished[last].wait(10)  # without another call of next
            items.settle()
            assert made == list(range(last + 1))


def test_an_error_comes_when_its_item_is_due_and_ends_the_thread() -> None:
    made: list[int] = []

    def make(item: int) -> float:
        made.append(item)
        return 6 / item

    with pytest.raises(ZeroDivisionError), OneAhead(make, [2, 0, 3]) as items:
        assert next(items) == 3.0
        next(items)
    assert made in ([2, 0], [2, 0, 3])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_closing_makes_no_more_and_ends_the_thread() -> None:
    made: list[int] = []
    with OneAhead(made.append, range(10)) as items:
        next(items)
    assert made in ([0], [0, 1])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
