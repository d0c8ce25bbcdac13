"""The most memory that this process has held."""

import resource
import sys

import torch

_UNIT = 1 if sys.platform == "darwin" else 1024  # Of ru_maxrss, in bytes.


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU of all tensors at once, since the last reset; otherwise resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def peak_memory_metric(device: torch.device) -> str:
    """What the figure of :func:`peak_memory` is called in MLflow."""
    return "peak_gpu_memory_bytes" if device.type == "cuda" else "peak_resident_memory_bytes"
