"""The four transforms of torchvision that SimpleTuner's image families use."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchvision.transforms import functional


class Compose:
    """One after the other."""

    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        """The last step's answer."""
        for step in self.steps:
            value = step(value)
        return value


class ToTensor:
    """Floats from 0 to 1, channels first."""

    def __call__(self, image: Any) -> Tensor:
        """See :func:`functional.to_tensor`."""
        return functional.to_tensor(image)


class Normalize:
    """Subtract ``mean`` and divide by ``std``."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, pixels: Tensor) -> Tensor:
        """``pixels`` [C, H, W]."""
        shape = (-1, 1, 1)
        return (pixels - pixels.new_tensor(self.mean).view(shape)) / pixels.new_tensor(self.std).view(shape)
