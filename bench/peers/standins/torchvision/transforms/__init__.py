"""The transforms of torchvision that SimpleTuner's image families and diffusers' examples use."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from PIL import Image
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


class InterpolationMode(Enum):
    """By torchvision's names, Pillow's filters."""

    BILINEAR = Image.Resampling.BILINEAR


class Resize:
    """The shorter edge becomes ``size``; a picture whose shorter edge has it is left alone."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.filter = size, interpolation.value

    def __call__(self, image: Any) -> Any:
        """``image`` of Pillow's."""
        shorter = min(image.size)
        if shorter == self.size:
            return image
        width, height = (int(self.size * edge / shorter) for edge in image.size)
        return image.resize((width, height), self.filter)


class CenterCrop:
    """A square of ``size`` from the middle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        """``image`` of Pillow's."""
        top, left = (round((edge - self.size) / 2) for edge in (image.height, image.width))
        return functional.crop(image, top, left, self.size, self.size)


class RandomHorizontalFlip:
    """Made by diffusers' examples, and never called here."""

    def __init__(self, p: float) -> None:
        self.p = p
