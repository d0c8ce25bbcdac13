"""The training loop.

One optimizer step is: for each micro-step draw a batch, noise it, ask the denoiser, score the answer, go backwards;
then clip, set the learning rate, step, and let the averages follow. Batches, noise and dropout depend on the seed and
the step's number only (:mod:`kubetuner.training.randomness`), so weights, averages, the optimizer's state and that
number are all that a checkpoint needs, and a resumed run has the losses of an uninterrupted one bit for bit.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kubetuner.config.sections import TrainSection
from kubetuner.errors import TrainingError
from kubetuner.progress import Progress
from kubetuner.training.averages import Averages
from kubetuner.training.checkpoints import Checkpoints, LossPoint, Snapshot
from kubetuner.training.compilation import Graphs, compiled
from kubetuner.training.feed import Feed
from kubetuner.training.interruption import StopRequest, TerminatedError
from kubetuner.training.memory import peak_memory
from kubetuner.training.meter import Log, Meter
from kubetuner.training.nonfinite import Guard
from kubetuner.training.objective import BatchSource, Objective, Question
from kubetuner.training.optimizers import clip_gradients, make_optimizer, set_learning_rate
from kubetuner.training.randomness import seed_dropout
from kubetuner.training.schedules import learning_rate
from kubetuner.training.taken import TakenStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and for how long.

    Attributes:
        denoiser: The network on its device; the parameters that require gradients are trained.
        epochs: Epochs gone through after so many micro-steps, for the log.
        total_steps: Optimizer steps.
    """

    section: TrainSection
    denoiser: nn.Module
    objective: Objective
    batches: BatchSource
    epochs: Callable[[int], float]
    total_steps: int
    device: torch.device

    def question(self, step: int, micro: int) -> Question:
        """The noised batch of one micro-step."""
        return self.objective.question(self.batches.batch(step, micro), step, micro)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters being trained, by name."""
        return {name: value for name, value in self.denoiser.named_parameters() if value.requires_grad}


@dataclass(frozen=True)
class Outcome:
    """How training went.

    Attributes:
        steps: Optimizer steps taken.
        points: What was logged, from the first step on.
        peak_memory_bytes: See :func:`~kubetuner.training.memory.peak_memory`; of this process, not of earlier ones.
        graphs: What torch.compile made; ``None`` without it.
    """

    steps: int
    points: tuple[LossPoint, ...]
    peak_memory_bytes: int
    graphs: Graphs | None


def train_denoiser(job: Job, checkpoints: Checkpoints, log: Log) -> Outcome:
    """Train ``job.denoiser`` in place, from the latest checkpoint if there is one; it ends with the averages, if any.

    Raises:
        TrainingError: The loss or gradient is not finite, or a named checkpoint cannot be used.
        TerminatedError: SIGTERM arrived; a checkpoint was saved.
    """
    section, learner = job.section, _learner(job)
    parameters = list(learner.parameters.values())
    start, points = _resume(job, learner, checkpoints)
    steps = range(start, job.total_steps)
    job.denoiser.train()
    with (
        StopRequest() as stop,
        Progress("train", job.total_steps, "steps", initial=start) as progress,
        Feed(job.question, steps, section.gradient_accumulation_steps, job.device) as feed,
        compiled(job.denoiser, section.compilation, job.objective.family.facts.repeated_blocks) as graphs,
    ):
        guard = Guard(section, checkpoints.beside, feed.again)
        meter = Meter(section, guard, log, progress, points)
        for step in steps:
            taken = _run_backwards(job, parameters, feed, step, graphs)
            if guard.skips(taken):
                progress.advance(note="skipped")
            else:
                learner.update(taken)
                meter.add(taken)
            learner.optimizer.zero_grad()
            if stop.received or _checkpoint_due(job, step + 1):
                meter.finish()
                checkpoints.save(learner.snapshot(step + 1, tuple(meter.points)))
            if stop.received and step + 1 < job.total_steps:
                raise TerminatedError(
                    f"stopped by SIGTERM after step {step + 1} of {job.total_steps}; "
                    "a checkpoint was saved: run again to resume"
                )
    if not meter.points:
        raise TrainingError(f"none of the {job.total_steps} steps had a finite loss; see {checkpoints.beside}")
    if learner.averages is not None:
        learner.averages.export()
    return Outcome(job.total_steps, tuple(meter.points), peak_memory(job.device), graphs)


@dataclass(frozen=True)
class _Learner:
    """What a step changes: the parameters, the optimizer's state, and the averages if there are any."""

    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    averages: Averages | None

    def update(self, taken: TakenStep) -> None:
        """Step along the clipped gradient."""
        set_learning_rate(self.optimizer, taken.learning_rate)
        self.optimizer.step()
        if self.averages is not None:
            self.averages.update(taken.number)

    def snapshot(self, taken: int, points: tuple[LossPoint, ...]) -> Snapshot:
        """The state after ``taken`` steps."""
        averages = {} if self.averages is None else self.averages.weights
        return Snapshot(taken, self.parameters, self.optimizer.state_dict(), points, averages)


def _learner(job: Job) -> _Learner:
    parameters = job.trained()
    averages = None if job.section.ema is None else Averages(job.section.ema, parameters)
    return _Learner(parameters, make_optimizer(job.section, list(parameters.values())), averages)


def _run_backwards(job: Job, parameters: list[nn.Parameter], feed: Feed, step: int, graphs: Graphs | None) -> TakenStep:
    """Gradients of one optimizer step, clipped."""
    section, micro_steps = job.section, job.section.gradient_accumulation_steps
    samples: list[str] = []
    regularising: list[bool] = []
    losses: list[Tensor] = []
    for micro in range(micro_steps):
        question = feed.next()
        seed_dropout(section.seed, step, micro)
        with nullcontext() if graphs is None else graphs.allowing(question):
            loss = job.objective.losses(job.denoiser, question)
            (loss.mean() / micro_steps).backward()  # type: ignore[no-untyped-call]
        samples.extend(question.samples)
        regularising.extend([question.regularising] * len(question.samples))
        losses.append(loss.detach())
    size = clip_gradients(section, parameters)
    rate = learning_rate(section, step, job.total_steps)
    epoch = job.epochs((step + 1) * micro_steps)
    return TakenStep(step + 1, rate, epoch, tuple(samples), torch.cat(losses), size, tuple(regularising))


def _checkpoint_due(job: Job, taken: int) -> bool:
    interval = job.section.checkpoint_step_interval
    return taken == job.total_steps or (interval > 0 and taken % interval == 0)


def _resume(job: Job, learner: _Learner, checkpoints: Checkpoints) -> tuple[int, tuple[LossPoint, ...]]:
    """Load the checkpoint that the section asks for; returns the steps taken and what they logged."""
    snapshot = checkpoints.load(job.section.resume_from_checkpoint)
    if snapshot is None:
        return 0, ()
    if learner.parameters.keys() != snapshot.weights.keys():
        raise TrainingError("the checkpoint holds other parameters than this run trains; delete it to start afresh")
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            parameter.copy_(snapshot.weights[name])
    learner.optimizer.load_state_dict(dict(snapshot.optimizer))
    if learner.averages is not None:
        learner.averages.load(snapshot.averages)
    logger.info("Resuming after step %d of %d", snapshot.step, job.total_steps)
    return snapshot.step, snapshot.points
