"""What every family does around drawing a picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kubetuner.config.sections.steps import EvaluateSection


@contextmanager
def drawing(pipeline: Any, section: EvaluateSection) -> Iterator[None]:
    """Without gradients, and in bfloat16 where the section asks for mixed precision."""
    mixed = section.mixed_precision == "bf16"
    with torch.no_grad(), torch.autocast(pipeline.device.type, dtype=torch.bfloat16, enabled=mixed):
        yield


def starting_noise(seed: int) -> torch.Generator:
    """A CPU generator, so a seed means the same picture on every device."""
    return torch.Generator("cpu").manual_seed(seed)
