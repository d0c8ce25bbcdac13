"""Questions in the order of training, prepared in the background where that helps."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from kubetuner.training.objective import Question

_AHEAD = 2


class Feed:
    """Yields the questions of the micro-steps ``micro_steps`` of all ``steps``, on ``device``.

    On a GPU one thread reads, noises and pins the next ones meanwhile. On a CPU that thread would only take time from
    the computation, so they are prepared when they are asked for.
    """

    def __init__(
        self, prepare: Callable[[int, int], Question], steps: range, micro_steps: Sequence[int], device: torch.device
    ) -> None:
        self._prepare, self._device = prepare, device
        self._positions: Iterator[tuple[int, int]] = ((step, micro) for step in steps for micro in micro_steps)
        self._worker = _thread() if device.type == "cuda" else None
        self._waiting: deque[Future[Question]] = deque()

    def next(self) -> Question:
        """The next question."""
        if self._worker is None:
            return self._prepare(*next(self._positions))
        while len(self._waiting) <= _AHEAD and (position := next(self._positions, None)) is not None:
            self._waiting.append(self._worker.submit(self._prepare_pinned, *position))
        return self._waiting.popleft().result().on(self._device)

    def again(self, step: int, micro: int) -> Question:
        """A question that was asked before, on the CPU; made in turn with the others, whose source is one thread's."""
        if self._worker is None:
            return self._prepare(step, micro)
        return self._worker.submit(self._prepare, step, micro).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def _prepare_pinned(self, step: int, micro: int) -> Question:
        return self._prepare(step, micro).pinned()


def _thread() -> ThreadPoolExecutor:
    """One thread on this process's GPU: a new thread would pin its memory on the first one."""
    return ThreadPoolExecutor(
        1, "kubetuner-feed", initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),)
    )
