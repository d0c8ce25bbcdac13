"""torch.compile over the denoiser while it trains, and the count of the graphs that this made.

Compiling takes from seconds to minutes per graph, so it may happen for each shape of a batch once and never again. What
the graphs are made for is a batch's shapes (latents and text) and whether the adapter is switched off; torch counts
them. A graph more for a batch that was seen before is a recompilation that nobody asked for: it is reported with
torch's reason, and torch stops compiling when they become many.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kubetuner.config.compilation import CompileSettings, missing_compiler
from kubetuner.errors import InputError
from kubetuner.training.objective import Question

logger = logging.getLogger(__name__)

# Blocks of another width, or whose input needs no gradient, have graphs of their own. SDXL with a LoRA has the most: 6.
_MOST_PER_SHAPE = 16
_SETTLED = 2
"""With recomputed activations the whole network is traced anew the second time, when its blocks are known."""


class Graphs:
    """The count of compiled graphs and of the shapes that they are for."""

    def __init__(self) -> None:
        self._start = _count()
        self._seen: Counter[tuple[object, ...]] = Counter()
        self.unexpected = 0

    @property
    def made(self) -> int:
        """Graphs compiled so far."""
        return _count() - self._start

    @property
    def shapes(self) -> int:
        """Different batches so far."""
        return len(self._seen)

    def __str__(self) -> str:
        several = "s" if self.shapes > 1 else ""
        text = f"compiled {self.made} graphs for {self.shapes} shape{several} of batches"
        return f"{text}, {self.unexpected} of them unexpectedly" if self.unexpected else text

    @contextmanager
    def allowing(self, question: Question, ahead: bool) -> Iterator[None]:
        """Around the forward and the backward pass of ``question``: what is compiled inside is counted as its.

        Args:
            question: The batch.
            ahead: The network is asked before it is trained on it, for whichever process.
        """
        from torch._dynamo import config

        key = _key(question, ahead)
        self._seen[key] += 1
        before, limit = _count(), _MOST_PER_SHAPE * len(self._seen)
        with config.patch(recompile_limit=limit, accumulated_recompile_limit=limit):
            yield
        more = _count() - before
        if more and self._seen[key] > _SETTLED:
            if not self.unexpected:
                logger.warning(
                    "torch.compile compiled %d more graph(s) for a batch of shapes that were compiled before, "
                    "which costs time: %s", more, _reason(),
                )  # fmt: skip
            self.unexpected += more


@contextmanager
def compiled(denoiser: nn.Module, settings: CompileSettings | None, blocks: Sequence[str]) -> Iterator[Graphs | None]:
    """The denoiser compiled in place, for as long as it trains; its modules and their names stay what they are.

    Args:
        denoiser: On its device, with its adapter.
        settings: ``None`` leaves it as it is and yields ``None``.
        blocks: Class names of the repeated blocks.
    """
    if settings is None:
        yield None
        return
    parts = [part for part in denoiser.modules() if _is_one_of(part, blocks)] if settings.regional else [denoiser]
    arguments: dict[str, Any] = {"backend": settings.backend, "fullgraph": settings.fullgraph}
    if settings.mode != "default":
        arguments["mode"] = settings.mode
    # As a plain attribute, so that a block stays the module that gradient checkpointing and peft know. What is called
    # is the same function of the class for all blocks, so those of equal shapes share their graphs. FSDP2 gathers the
    # weights of a block before it is called, and not while it is traced.
    for part in parts:
        part.__dict__["forward"] = torch.compile(part.forward, dynamic=settings.dynamic, **arguments)
    graphs = Graphs()
    try:
        yield graphs
    finally:
        for part in parts:
            del part.__dict__["forward"]


def require_compiler(settings: CompileSettings | None, device: torch.device) -> None:
    """Refuse early what would fail in the first step.

    Raises:
        InputError: inductor is asked for, and its compiler is missing.
    """
    if settings is None or settings.backend != "inductor":
        return
    if compiler := missing_compiler(settings):
        raise InputError(
            f"dynamo_backend: inductor needs a C++ compiler, and {compiler} is not installed; install it (in an image "
            "of Debian's: g++), name another one in the environment variable CXX, or use 'no'."
        )
    if device.type == "cuda" and not _has_triton():
        raise InputError(
            "dynamo_backend: inductor needs Triton to write kernels for the GPU, and it cannot be used here; "
            "install the package triton for a GPU of compute capability 7.0 or above, or use 'no'."
        )


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


def _is_one_of(part: nn.Module, classes: Sequence[str]) -> bool:
    """Whether it is of one of the ``classes``; FSDP2 gives a sharded module a class of its own below them."""
    return any(kind.__name__ in classes for kind in type(part).__mro__)


def _key(question: Question, ahead: bool) -> tuple[object, ...]:
    return ahead, question.regularising, *question.shapes()


def _count() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _reason() -> str:
    """Torch's own word on the latest recompilation."""
    from torch._dynamo.utils import get_compilation_metrics

    reasons = [metrics.recompile_reason for metrics in get_compilation_metrics() if metrics.recompile_reason]
    return reasons[-1] if reasons else "torch gave no reason; run again with TORCH_LOGS=recompiles"
