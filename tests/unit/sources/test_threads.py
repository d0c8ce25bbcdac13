"""Work on several threads."""

import threading
import time
from collections.abc import Iterator

import pytest

from kubetuner.sources.threads import in_threads


def test_results_come_in_order() -> None:
    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number * number

    assert list(in_threads(work, range(50), 4, "test")) == [number * number for number in range(50)]


def test_little_is_begun_ahead() -> None:
    asked = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            asked.append(number)
            yield number

    results = in_threads(str, numbers(), 2, "test")
    assert next(results) == "0"
    assert len(asked) < 30
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test_")]


def test_an_exception_ends_the_work() -> None:
    done = []

    def work(number: int) -> None:
        if number == 3:
            raise ValueError(number)
        done.append(number)

    with pytest.raises(ValueError, match="3"):
        list(in_threads(work, range(1000), 2, "test"))
    assert len(done) < 30
