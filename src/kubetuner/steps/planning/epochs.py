"""``start_epoch`` and ``end_epoch``: schedules in epochs, made into optimizer steps by the plan's counts.

An epoch goes once through the datasets that are drawn from in it, so it lasts longer where there are more of them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from kubetuner.config.data_file.sampling import Epochs
from kubetuner.config.sections.steps import TrainSection
from kubetuner.errors import Problem
from kubetuner.steps.planning.datasets import Measured, batches_per_epoch


def schedule_epochs(
    measured: Sequence[Measured], train: TrainSection, problems: list[Problem]
) -> tuple[list[Measured], TrainSection, list[str]]:
    """Put steps in the place of epochs.

    Args:
        measured: All datasets.
        train: With ``num_train_epochs`` or ``max_train_steps``.
        problems: Receives epochs without any dataset.

    Returns:
        The datasets and the section with ``start_step``, ``end_step`` and ``max_train_steps``, and a sentence for
        each dataset that was changed. All as they were where no dataset has a schedule in epochs.
    """
    trained = [one for one in measured if one.trained_on]
    epochs = {one.id: one.entry.epochs or Epochs() for one in trained}
    scheduled = [one for one in trained if one.entry.epochs is not None]
    if not scheduled or not all(one.exists for one in trained):
        return list(measured), train, []
    steps = {edge: _steps(trained, epochs, edge, train) for edge in _edges(epochs)}
    firsts = {1: 1}
    for edge, following in pairwise(steps):
        firsts[following] = firsts[edge] + (following - edge) * max(steps[edge], 1)
    within = [edge for edge in steps if edge <= train.num_train_epochs or firsts[edge] <= train.max_train_steps]
    if empty := [edge for edge in within if not steps[edge]]:
        message = f"leaves the epochs from {empty[0]} on without any dataset; let one of them go on or begin then."
        problems.append(Problem(f"{scheduled[0].entry.where}.end_epoch", message))
        return list(measured), train, []
    changed = [_in_steps(one, firsts) if one.entry.epochs is not None else one for one in measured]
    update: dict[str, object] = {"datasets": tuple(one.entry.sampling for one in changed if one.trained_on)}
    if train.num_train_epochs:
        edge = within[-1]
        total = firsts[edge] + (train.num_train_epochs - edge + 1) * steps[edge] - 1
        update |= {"num_train_epochs": 0, "max_train_steps": total}
    return changed, train.model_copy(update=update), [_remark(one) for one in changed if one.entry.epochs is not None]


def _edges(epochs: dict[str, Epochs]) -> list[int]:
    """The epochs in which a dataset comes or goes, from 1."""
    found = {1} | {one.first for one in epochs.values()}
    return sorted(found | {one.last + 1 for one in epochs.values() if one.last is not None})


def _steps(trained: Sequence[Measured], epochs: dict[str, Epochs], epoch: int, train: TrainSection) -> int:
    """Optimizer steps of one epoch; 0 without any dataset."""
    active = [
        one
        for one in trained
        if epochs[one.id].first <= epoch and (epochs[one.id].last is None or epoch <= (epochs[one.id].last or 0))
    ]
    batches = sum(batches_per_epoch(one, train) for one in active)
    return max(math.ceil(batches / train.planned_micro_steps), 1) if active else 0


def _in_steps(one: Measured, firsts: dict[int, int]) -> Measured:
    epochs = one.entry.epochs or Epochs()
    end = None if epochs.last is None else firsts[epochs.last + 1] - 1
    sampling = one.entry.sampling.model_copy(update={"start_step": firsts[epochs.first], "end_step": end})
    return replace(one, entry=replace(one.entry, sampling=sampling))


def _remark(one: Measured) -> str:
    epochs, sampling = one.entry.epochs or Epochs(), one.entry.sampling
    if epochs.last is None or sampling.end_step is None:
        return f"`{one.id}`: from epoch {epochs.first} on, which is from step {sampling.start_step} on"
    return f"`{one.id}`: epochs {epochs.first} to {epochs.last} are steps {sampling.start_step} to {sampling.end_step}"
