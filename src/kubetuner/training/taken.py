"""What one optimizer step leaves behind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TakenStep:
    """A step's numbers, on the device.

    Attributes:
        number: 1 for the first step.
        samples: Names of this process's samples.
        losses: Loss per sample over the micro-steps of all processes.
        sizes: Samples of each of those micro-steps.
        gradient: Size of the gradient before clipping.
        regularising: Per sample, whether its target was the base model's prediction.
    """

    number: int
    learning_rate: float
    epoch: float
    samples: tuple[str, ...]
    losses: Tensor
    sizes: tuple[int, ...]
    gradient: Tensor
    regularising: tuple[bool, ...]

    def shares(self) -> list[float]:
        """How much each sample counts where all batches count the same, large or small, as they do in the gradient.

        1 on average, and for every sample where all batches are of one size.
        """
        total = sum(self.sizes)
        return [total / (len(self.sizes) * size) for size in self.sizes for _ in range(size)]


def what_is_not_finite(taken: TakenStep, losses: Sequence[float], gradient: float) -> str:
    """A sentence that names samples and says what to do; empty when all of the step's numbers are finite."""
    bad = [name for name, loss in zip(taken.samples, losses, strict=True) if not math.isfinite(loss)]
    if bad:
        return (
            f"the loss of step {taken.number} is not finite for {', '.join(bad[:10])}"
            f"{f' and {len(bad) - 10} more' if len(bad) > 10 else ''}: look at these samples, "
            f"or lower learning_rate (now {taken.learning_rate:.2e}) if the loss grew before"
        )
    if not math.isfinite(gradient):
        return (
            f"the gradient of step {taken.number} is not finite (its loss is); "
            f"samples: {', '.join(taken.samples[:10])}; "
            f"lower learning_rate (now {taken.learning_rate:.2e}) or max_grad_norm"
        )
    return ""
