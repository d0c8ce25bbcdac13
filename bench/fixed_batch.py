"""A batch that is always the same, for benches of what comes after reading it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kubetuner.artifacts import LatentRow
from kubetuner.families.base import Named


@dataclass(frozen=True)
class FixedBatch:
    """One batch in memory."""

    rows: Sequence[LatentRow]
    latents: Tensor
    texts: Sequence[Named]
    before: int = 0
    masks: Tensor | None = None


@dataclass(frozen=True)
class FixedBatches:
    """Always the same batch."""

    fixed: FixedBatch

    def batch(self, step: int, micro: int) -> FixedBatch:
        """The batch."""
        return self.fixed
