"""Losses on their way from the device to the log.

Reading a number from a GPU waits until the GPU has computed it. So a step's numbers are read while the next step is
already queued: every step is checked and logged, one step late, and the GPU never runs dry.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from kubetuner.config.sections.steps import TrainSection
from kubetuner.diffusion.rollout import probability
from kubetuner.progress import Progress
from kubetuner.training.averages import decay_after
from kubetuner.training.checkpoints import LossPoint
from kubetuner.training.nonfinite import Guard
from kubetuner.training.taken import TakenStep

Log = Callable[[Mapping[str, float], int], None]


class _Reading:
    """A step's numbers on their way to the CPU."""

    def __init__(self, taken: TakenStep) -> None:
        self.taken = taken
        together = torch.cat([taken.losses, taken.gradient.reshape(1)])
        self._numbers = together.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if together.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def numbers(self) -> list[float]:
        """Losses, then the size of the gradient; waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers


class Meter:
    """Checks and logs taken steps."""

    def __init__(
        self, section: TrainSection, guard: Guard, log: Log, progress: Progress, points: Sequence[LossPoint]
    ) -> None:
        self._interval = max(1, section.log_step_interval)
        self._gradient_name = "grad_norm" if section.grad_clip_method == "norm" else "grad_absmax"
        self._guard, self._log, self._progress = guard, log, progress
        self._ema, self._rollout = section.ema, section.rollout
        self.points = list(points)
        self._pending: _Reading | None = None

    def add(self, taken: TakenStep) -> None:
        """Start reading ``taken``; finish the step before it (on a CPU: this one)."""
        reading = _Reading(taken)
        if taken.losses.is_cuda:
            self.finish()
            self._pending = reading
        else:
            self._pending = reading
            self.finish()

    def finish(self) -> None:
        """Check and log the step that is still being read.

        Raises:
            TrainingError: Its loss or gradient is not finite; names the samples.
        """
        if self._pending is None:
            return
        reading, self._pending = self._pending, None
        taken, (*losses, gradient) = reading.taken, reading.numbers()
        self._guard.require_finite(taken, losses, gradient)
        shares = taken.shares()
        loss = _mean(losses, shares)
        self._progress.advance(note=f"loss {loss:.4f}, lr {taken.learning_rate:.2e}")
        if taken.number % self._interval == 0 or not self.points:
            self.points.append(LossPoint(step=taken.number, loss=loss, lr=taken.learning_rate))
            values = {"train_loss": loss, "learning_rate": taken.learning_rate, "epoch": taken.epoch}
            if self._rollout is not None:
                values["rollout_probability"] = probability(self._rollout, taken.number - 1)
            if self._ema is not None:
                values["ema_decay_value"] = decay_after(self._ema, taken.number)
            if any(taken.regularising):
                kept = [share * regularising for share, regularising in zip(shares, taken.regularising, strict=True)]
                values["regularisation_loss"] = _mean(losses, kept)
            self._log({**values, self._gradient_name: gradient}, taken.number)


def _mean(losses: Sequence[float], shares: Sequence[float]) -> float:
    """The mean of what has a share."""
    return sum(loss * share for loss, share in zip(losses, shares, strict=True) if share) / sum(shares)
