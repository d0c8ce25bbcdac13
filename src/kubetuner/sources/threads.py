"""Work on several threads, with results in order and memory that does not grow with the number of items."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_AHEAD = 8

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Argument], Result], items: Iterable[Argument], threads: int, name: str
) -> Iterator[Result]:
    """``work`` of every item, in the order of ``items``; at most a few items a thread are begun ahead.

    Args:
        work: Called on several threads; its exception is raised here, and nothing more is begun.
        items: What to work on.
        threads: At least 1.
        name: Of the threads.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > threads * _AHEAD:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
