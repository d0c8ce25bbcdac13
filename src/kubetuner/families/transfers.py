"""Tensors to an encoder's device and back, so that a GPU and the thread that feeds it do not wait for each other."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

BegunT = TypeVar("BegunT")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` of the CPU on ``device``; a GPU fetches it when it comes to it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def one_behind(begun: Iterable[BegunT]) -> Iterator[BegunT]:
    """Each of ``begun`` when the next has been begun too, so that a GPU has work while the results are waited for."""
    last: list[BegunT] = []
    for following in begun:
        if last:
            yield last.pop()
        last.append(following)
    yield from last


class Arriving:
    """Tensors on their way from a device to the CPU, as ``dtype``.

    Args:
        tensors: By name; on a GPU, what is still to be computed.
        dtype: They are converted before they travel.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._arrived: torch.cuda.Event | None = None
        # Not blocking: to memory that the GPU writes by itself.
        self._tensors = {name: one.to(dtype).to("cpu", non_blocking=True) for name, one in tensors.items()}
        devices = {one.device for one in tensors.values() if one.device.type == "cuda"}
        for device in devices:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(device))

    def tensors(self) -> dict[str, Tensor]:
        """All of them, when they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
