"""Steps whose loss or gradient is not finite: what is kept of them, and whether training goes on."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kubetuner.config.sections.steps import TrainSection
from kubetuner.errors import TrainingError
from kubetuner.training.distributed.processes import ALONE, Processes
from kubetuner.training.objective import Question
from kubetuner.training.randomness import derive_seed
from kubetuner.training.taken import TakenStep, what_is_not_finite

logger = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 10
BATCH, POSITION = "batch.safetensors", "position.json"
_PURPOSES = ("noise", "offset", "perturbation", "levels", "masks", "rollout", "dropout")


class Guard:
    """The section's ``nonfinite_loss`` policy.

    ``stop`` reads a step's numbers when they arrive, so that a GPU never waits; the update was made by then, and no
    checkpoint has it. ``skip`` waits for every step's numbers before its update.

    Args:
        section: Holds the policy and the seed.
        folder: A folder ``step-<number>`` per bad step is written below it.
        prepare: Makes the question of a (step, micro-step) again.
        processes: They read the same numbers and decide the same; the first one writes.
    """

    def __init__(
        self,
        section: TrainSection,
        folder: Path,
        prepare: Callable[[int, int], Question],
        processes: Processes = ALONE,
    ) -> None:
        self._section, self._folder, self._prepare, self._processes = section, folder, prepare, processes
        self._in_a_row = 0

    def skips(self, taken: TakenStep) -> bool:
        """Whether the update of ``taken``, not made yet, is to be left out.

        Raises:
            TrainingError: Too many steps in a row were.
        """
        if self._section.nonfinite_loss != "skip":
            return False
        *losses, gradient = torch.cat([taken.losses, taken.gradient.reshape(1)]).tolist()
        if all(map(math.isfinite, (*losses, gradient))):
            self._in_a_row = 0
            return False
        taken = self._named(taken)
        wrong = what_is_not_finite(taken, losses, gradient)
        kept = self._keep(taken, losses, gradient)
        self._in_a_row += 1
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(f"{self._in_a_row} steps in a row were not finite; {wrong}; its batch is in {kept}")
        logger.warning("Skipping the update: %s; its batch is in %s", wrong, kept)
        return True

    def require_finite(self, taken: TakenStep, losses: Sequence[float], gradient: float) -> None:
        """Check the numbers of a step whose update was made.

        Raises:
            TrainingError: They are not finite; names the samples and where the batch was put.
        """
        if all(map(math.isfinite, (*losses, gradient))):
            return
        taken = self._named(taken)
        kept, wrong = self._keep(taken, losses, gradient), what_is_not_finite(taken, losses, gradient)
        raise TrainingError(f"{wrong}; its batch is in {kept}. Set nonfinite_loss to skip to leave such steps out.")

    def _named(self, taken: TakenStep) -> TakenStep:
        """The step with the names of all processes' samples, in the order of its losses."""
        return replace(taken, samples=self._processes.all_of(taken.samples, taken.sizes))

    def _keep(self, taken: TakenStep, losses: Sequence[float], gradient: float) -> Path:
        """Write the noised batch of every micro-step and the seeds; with a checkpoint they are the step again."""
        step, seed = taken.number - 1, self._section.seed
        micro_steps = self._section.gradient_accumulation_steps * self._processes.count
        final, temporary = self._folder / f"step-{taken.number}", self._folder / f".step-{taken.number}.tmp"
        if not self._processes.first:
            return final
        tensors: dict[str, Tensor] = {}
        for micro in range(micro_steps):
            tensors |= {f"{micro}.{name}": tensor for name, tensor in self._prepare(step, micro).named().items()}
        position = {
            "step": taken.number,
            "steps_before": step,
            "learning_rate": taken.learning_rate,
            "losses": [f"{name}: {loss}" for name, loss in zip(taken.samples, losses, strict=True)],
            "regularising": list(taken.regularising),
            "gradient": str(gradient),
            "seed": seed,
            "seeds": [
                {purpose: derive_seed(seed, purpose, step, micro) for purpose in _PURPOSES}
                for micro in range(micro_steps)
            ],
        }
        for folder in (temporary, final):
            shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary / BATCH)
        (temporary / POSITION).write_text(json.dumps(position, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.rename(final)
        return final
