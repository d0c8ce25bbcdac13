"""What is called as a function."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_tensor(image: Any) -> Tensor:
    """[C, H, W] floats from 0 to 1 of a picture, or of an array [H, W, C] of bytes or floats."""
    pixels = torch.from_numpy(np.array(image, copy=True))
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    pixels = pixels.permute(2, 0, 1).contiguous()
    return pixels.float().div(255) if pixels.dtype == torch.uint8 else pixels


def crop(image: Any, top: int, left: int, height: int, width: int) -> Any:
    """A part of a picture of Pillow's."""
    return image.crop((left, top, left + width, top + height))
