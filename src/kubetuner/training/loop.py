"""The training loop.

One optimizer step is: for each micro-step draw a batch, noise it, ask the denoiser, score the answer, go backwards;
then clip, set the learning rate, step, and let the averages follow. Batches, noise and dropout depend on the seed and
the step's number only (:mod:`kubetuner.training.randomness`), so weights, averages, the optimizer's state and that
number are all that a checkpoint needs, and a resumed run has the losses of an uninterrupted one bit for bit. Several
processes share the micro-steps of a step (:mod:`kubetuner.training.distributed.processes`).
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kubetuner.config.sections.steps import TrainSection
from kubetuner.errors import TrainingError
from kubetuner.progress import Progress
from kubetuner.training.averages import Averages
from kubetuner.training.checkpoints import Checkpoints, LossPoint, Snapshot
from kubetuner.training.compilation import Graphs, compiled
from kubetuner.training.distributed.processes import ALONE, Processes
from kubetuner.training.distributed.sharding import collect, collect_state, part, spread, spread_state
from kubetuner.training.feed import Feed
from kubetuner.training.interruption import StopRequest, TerminatedError
from kubetuner.training.memory.peak import peak_memory
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
        processes: Those that train ``denoiser`` together.
    """

    section: TrainSection
    denoiser: nn.Module
    objective: Objective
    batches: BatchSource
    epochs: Callable[[int], float]
    total_steps: int
    device: torch.device
    processes: Processes = ALONE

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
        peak_memory_bytes: See :func:`~kubetuner.training.memory.peak.peak_memory`; of this process alone.
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
        TerminatedError: SIGTERM arrived, in whichever process; a checkpoint was saved.
    """
    section, processes = job.section, job.processes
    learner = _learner(job)
    start, points = _resume(job, learner, checkpoints)
    steps, micro_steps = range(start, job.total_steps), processes.micro_steps(section.gradient_accumulation_steps)
    job.denoiser.train()
    with (
        StopRequest() as stop,
        Progress("train", job.total_steps, "steps", initial=start, quiet=not processes.first) as progress,
        Feed(job.question, steps, micro_steps, job.device) as feed,
        compiled(job.denoiser, section.compilation, job.objective.family.facts.repeated_blocks) as graphs,
    ):
        guard = Guard(section, checkpoints.beside, feed.again, processes)
        meter = Meter(section, guard, log, progress, points)
        for step in steps:
            taken = _run_backwards(job, learner, feed, step, graphs)
            if guard.skips(taken):
                progress.advance(note="skipped")
            else:
                learner.update(taken)
                meter.add(taken)
            learner.optimizer.zero_grad()
            stopping = processes.any(stop.received)
            if stopping or _checkpoint_due(job, step + 1):
                meter.finish()
                _save(processes, checkpoints, learner.snapshot(processes, step + 1, tuple(meter.points)))
            if stopping and step + 1 < job.total_steps:
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
    """What a step asks and changes.

    Attributes:
        network: The denoiser as the processes share it.
        parameters: Those that are trained, by name.
        averages: Theirs, if this process keeps any.
    """

    network: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    averages: Averages | None

    def update(self, taken: TakenStep) -> None:
        """Step along the clipped gradient."""
        set_learning_rate(self.optimizer, taken.learning_rate)
        self.optimizer.step()
        if self.averages is not None:
            self.averages.update(taken.number)

    def snapshot(self, processes: Processes, taken: int, points: tuple[LossPoint, ...]) -> Snapshot:
        """The state after ``taken`` steps; complete in the first process only."""
        keep = processes.first
        weights = collect(self.parameters, self.parameters, keep)
        averages = {} if self.averages is None else collect(self.averages.weights, self.parameters, keep)
        return Snapshot(taken, weights, collect_state(self.optimizer, keep), points, averages)


def _learner(job: Job) -> _Learner:
    processes = job.processes
    network = processes.network(job.denoiser)
    parameters, averages = job.trained(), None  # Sharding puts others in their place, so they are taken after it.
    if job.section.ema is not None and (processes.first or processes.sharded):
        averages = Averages(job.section.ema, parameters)
    return _Learner(network, parameters, make_optimizer(job.section, list(parameters.values())), averages)


def _run_backwards(job: Job, learner: _Learner, feed: Feed, step: int, graphs: Graphs | None) -> TakenStep:
    """Gradients of one optimizer step, clipped."""
    section, processes = job.section, job.processes
    micro_steps = processes.micro_steps(section.gradient_accumulation_steps)
    samples: list[str] = []
    regularising: list[bool] = []
    losses: list[Tensor] = []
    for micro in micro_steps:
        question = feed.next()
        seed_dropout(section.seed, step, micro)
        compiling = nullcontext() if graphs is None else graphs.allowing(question, _ahead(job, question))
        with compiling, processes.accumulating(learner.network, micro == micro_steps[-1]):
            loss = job.objective.losses(learner.network, question, processes.in_step)
            (loss.mean() / len(micro_steps)).backward()  # type: ignore[no-untyped-call]
        samples.extend(question.samples)
        regularising.extend([question.regularising] * len(question.samples))
        losses.append(loss.detach())
    gradient = clip_gradients(section, list(learner.parameters.values()))
    sizes = processes.sizes([len(loss) for loss in losses])
    everyones = processes.gathered(torch.cat(losses), sizes)
    return TakenStep(
        number=step + 1,
        learning_rate=learning_rate(section, step, job.total_steps),
        epoch=job.epochs((step + 1) * len(micro_steps) * processes.count),
        samples=tuple(samples),
        losses=everyones,
        sizes=sizes,
        gradient=gradient,
        regularising=processes.all_of(regularising, sizes) if job.objective.regularising else (False,) * sum(sizes),
    )


def _ahead(job: Job, question: Question) -> bool:
    """Whether any process that this one must keep up with asks the network before it trains on its batch."""
    return job.objective.asks_ahead and job.processes.in_step(question.asks_ahead)


def _save(processes: Processes, checkpoints: Checkpoints, snapshot: Snapshot) -> None:
    """Write one checkpoint for all; none goes on, or ends, before it is complete."""
    if processes.first:
        checkpoints.save(snapshot)
    processes.wait()


def _checkpoint_due(job: Job, taken: int) -> bool:
    steps, epochs = job.section.checkpoint_step_interval, job.section.checkpoint_epoch_interval
    if taken == job.total_steps or (steps > 0 and taken % steps == 0):
        return True
    if epochs == 0:
        return False
    micro_steps = job.section.gradient_accumulation_steps * job.processes.count
    before = job.epochs((taken - 1) * micro_steps) if taken > 1 else 0.0
    return job.epochs(taken * micro_steps) // epochs > before // epochs


def _resume(job: Job, learner: _Learner, checkpoints: Checkpoints) -> tuple[int, tuple[LossPoint, ...]]:
    """Load the checkpoint that the section asks for; returns the steps taken and what they logged."""
    snapshot = checkpoints.load(job.section.resume_from_checkpoint)
    found = 0 if snapshot is None else snapshot.step
    if job.processes.any(found != job.processes.from_first(found)):
        raise TrainingError(
            f"process {job.processes.rank} of {job.processes.count} finds a checkpoint of step {found}, and the first "
            "or another one does not: KUBETUNER_CHECKPOINTS must be a folder that all of them see"
        )
    if snapshot is None:
        return 0, ()
    if learner.parameters.keys() != snapshot.weights.keys():
        raise TrainingError("the checkpoint holds other parameters than this run trains; delete it to start afresh")
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            part(parameter).copy_(part(spread(snapshot.weights[name], parameter)))
    learner.optimizer.load_state_dict(spread_state(snapshot.optimizer, list(learner.parameters.values())))
    if learner.averages is not None:
        learner.averages.load(snapshot.averages)
    logger.info("Resuming after step %d of %d", snapshot.step, job.total_steps)
    return snapshot.step, snapshot.points
