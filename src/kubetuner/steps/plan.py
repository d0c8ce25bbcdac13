"""``plan``: check a run against what is on disk, resolve its revisions and say what it will do; needs no torch."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kubetuner.config.load import RunConfig, load
from kubetuner.config.sections.steps import Sections
from kubetuner.errors import ConfigError, Problem
from kubetuner.steps.planning.costs import Costs, estimate, vae_shape
from kubetuner.steps.planning.datasets import (
    Measured,
    bucket_problems,
    drawn_per_epoch,
    measure,
    steps_per_epoch,
    unreadable_problems,
)
from kubetuner.steps.planning.epochs import schedule_epochs
from kubetuner.steps.planning.filtered import filter_remarks
from kubetuner.steps.planning.levels import level_remarks
from kubetuner.steps.planning.machinery import library_problems, store_problems, trainjob_problems
from kubetuner.steps.planning.masks import PlannedMasks, open_masks
from kubetuner.steps.planning.memory import Forecast, forecast
from kubetuner.steps.planning.models import resolve_models
from kubetuner.steps.planning.on_demand import on_demand_remarks
from kubetuner.steps.planning.oversubscription import oversubscribe
from kubetuner.steps.planning.page import page
from kubetuner.steps.planning.told_sizes import size_remarks


@dataclass(frozen=True)
class Plan:
    """A run that can start.

    Attributes:
        sections: Settings by step, with local paths absolute and revisions filled in.
        markdown: The page for a person.
        summary: The page's numbers, as JSON values.
        run: The configuration the sections come from.
    """

    sections: Sections
    markdown: str
    summary: dict[str, object]
    run: RunConfig


def make_plan(
    config: Mapping[str, object], data: Sequence[object] | None, *, cwd: Path, predict_memory: bool = False
) -> Plan:
    """Validate the two files, look at the folders they name and count what training will see.

    Args:
        config: The object in ``config.json``.
        data: The list in ``multidatabackend.json``; read from ``data_backend_config`` when ``None``.
        cwd: Folder that the paths in the files are relative to.
        predict_memory: Say how much GPU memory training takes; needs PyTorch and seconds.

    Raises:
        ConfigError: With every problem: of the files, missing folders, or too few pictures for a batch.
    """
    run = load(config, data, cwd=cwd)
    problems: list[Problem] = []
    sections = resolve_models(run.sections, cwd, problems)
    with ExitStack() as stack:
        masks = open_masks(run.data.masks, cwd, stack, problems)
        measured = [measure(one, cwd, problems, masks.theirs.get(one.source.id)) for one in run.data.pictures]
    problems.extend(masks.problems(run.data.masks))
    raised: list[str] = []
    if run.allow_dataset_oversubscription:
        measured, raised = oversubscribe(measured, sections.train)
    measured, train, in_steps = schedule_epochs(measured, sections.train, problems)
    sections = sections.model_copy(update={"train": train})
    for one in measured:
        problems.extend(bucket_problems(one, train))
        problems.extend(unreadable_problems(one, sections.download.max_skipped_share))
    problems.extend(_alignment_problems(sections, run))
    problems.extend(library_problems(sections.train, sections.cache_text_embeds.rounding))
    problems.extend(store_problems())
    problems.extend(trainjob_problems(sections.train))
    if problems:
        raise ConfigError(problems)
    sections = _resolve_repeats(_resolve_datasets(sections, measured, masks), measured)
    epoch = steps_per_epoch(measured, train)
    costs = estimate(sections, measured)
    found = forecast(sections, measured) if predict_memory else None
    summary = _summary(sections, measured, epoch, costs, found)
    remarks = [*raised, *in_steps, *level_remarks(train), *filter_remarks(measured), *masks.remarks(run.data.masks)]
    remarks += size_remarks({one.id: one.doubted for one in measured if one.doubted})
    remarks += on_demand_remarks(sections, measured)
    return Plan(sections, page(run, sections, measured, epoch, costs, remarks, found), summary, run)


def _alignment_problems(sections: Sections, run: RunConfig) -> list[Problem]:
    factor, _ = vae_shape(sections.train.model)
    return [
        Problem(
            f"{entry.where}.aspect_bucket_alignment",
            f"is {alignment}; the model's autoencoder needs a multiple of {factor}.",
        )
        for entry in run.data.pictures
        if (alignment := entry.geometry.geometry.aspect_bucket_alignment) % factor
    ]


def _resolve_datasets(sections: Sections, measured: Sequence[Measured], masks: PlannedMasks) -> Sections:
    found = {"datasets": tuple(one.source for one in measured), "masks": tuple(masks.sources)}
    return sections.model_copy(update={"download": sections.download.model_copy(update=found)})


def _resolve_repeats(sections: Sections, measured: Sequence[Measured]) -> Sections:
    """The sections with the repeats that were raised."""
    datasets = tuple(one.entry.sampling for one in measured if one.trained_on)
    train = sections.train.model_copy(update={"datasets": datasets})
    push = sections.push.model_copy(update={"training": train.to_json()})
    return sections.model_copy(update={"train": train, "push": push})


def _summary(
    sections: Sections, measured: Sequence[Measured], epoch: int, costs: Costs, found: Forecast | None
) -> dict[str, object]:
    train = sections.train
    return {
        "model": train.model.path,
        "model_revision": train.model.revision,
        "repeats": {one.id: one.entry.sampling.repeats for one in measured if one.trained_on},
        "samples_per_epoch": {one.id: drawn_per_epoch(one, train) for one in measured if one.trained_on},
        "samples": {one.id: one.samples for one in measured},
        "skipped": {one.id: len(one.skipped) for one in measured},
        "filtered": {one.id: sum(each.count for each in one.filtered) for one in measured},
        "buckets": {one.id: {name: sizes.total() for name, sizes in one.buckets.items()} for one in measured},
        "steps_per_epoch": epoch,
        "max_train_steps": train.max_train_steps or train.num_train_epochs * epoch,
        "epochs": train.num_train_epochs or math.ceil(train.max_train_steps / epoch),
        "latents_bytes": costs.latents_bytes,
        "text_embeds_bytes": costs.text_embeds_bytes,
        "training_memory_bytes": costs.training_memory_bytes,
        "peak_memory_bytes": None if found is None or found.memory is None else found.memory.peak,
    }
