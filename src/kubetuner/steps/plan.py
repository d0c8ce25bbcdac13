"""``plan``: check a run against what is on disk, resolve its revisions and say what it will do; needs no torch."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kubetuner.config.load import RunConfig, load
from kubetuner.config.sections import ModelRef, Sections
from kubetuner.errors import ConfigError, Problem
from kubetuner.steps.plan_costs import Costs, estimate, vae_shape
from kubetuner.steps.plan_datasets import Measured, bucket_problems, measure, steps_per_epoch
from kubetuner.steps.plan_page import page

_HASH_BLOCK = 1 << 20


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


def make_plan(config: Mapping[str, object], data: Sequence[object] | None, *, cwd: Path) -> Plan:
    """Validate the two files, look at the folders they name and count what training will see.

    Args:
        config: The object in ``config.json``.
        data: The list in ``multidatabackend.json``; read from ``data_backend_config`` when ``None``.
        cwd: Folder that the paths in the files are relative to.

    Raises:
        ConfigError: With every problem: of the files, missing folders, or too few pictures for a batch.
    """
    run = load(config, data, cwd=cwd)
    problems: list[Problem] = []
    models = _Models(cwd, problems)
    sections = _resolve_models(run.sections, models)
    measured = [measure(entry, cwd, problems) for entry in run.data.pictures]
    train = sections.train
    for one in measured:
        problems.extend(bucket_problems(one, train))
    problems.extend(_alignment_problems(sections, run))
    if problems:
        raise ConfigError(problems)
    sections = _resolve_datasets(sections, measured)
    epoch = steps_per_epoch(measured, train)
    costs = estimate(sections, measured)
    summary = _summary(sections, measured, epoch, costs)
    return Plan(sections, page(run, sections, measured, epoch, costs), summary, run)


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


def folder_revision(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below ``folder``, hidden ones left out."""
    digest = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file())
    named = sorted((path.relative_to(folder).as_posix(), path) for path in files)
    for name, path in named:
        if any(part.startswith(".") for part in name.split("/")):
            continue
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_HASH_BLOCK):
                content.update(block)
        digest.update(f"{len(name)} {name} {content.hexdigest()}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Models:
    """Turns names of models into absolute folders where they are folders."""

    cwd: Path
    problems: list[Problem]

    def path(self, name: str, key: str) -> tuple[str, bool]:
        """The name to use, and whether it is a folder."""
        if not name:
            return name, False
        folder = (self.cwd / name).expanduser()
        if folder.is_dir():
            return str(folder.resolve()), True
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            message = f"{folder} is not a folder; expected a folder or a hub id namespace/name."
            self.problems.append(Problem(f"config.json.{key}", message))
        return name, False


def _resolve_models(sections: Sections, models: _Models) -> Sections:
    given = sections.train.model
    path, local = models.path(given.path, "pretrained_model_name_or_path")
    vae_path, vae_local = models.path(given.vae_path, "pretrained_vae_model_name_or_path")
    judge, judge_local = models.path(sections.evaluate.judge, "pretrained_evaluation_model_name_or_path")
    if local and not (Path(path) / "model_index.json").is_file():
        message = f"{path} holds no model_index.json; expected the folder of a diffusers pipeline."
        models.problems.append(Problem("config.json.pretrained_model_name_or_path", message))
    if local and given.revision:
        message = "has no meaning for a folder, whose contents are hashed; remove it."
        models.problems.append(Problem("config.json.revision", message))
    revision = folder_revision(Path(path)) if local else given.revision
    model = ModelRef(
        family=given.family,
        path=path,
        revision=revision,
        variant=given.variant,
        vae_path=vae_path,
        vae_revision=folder_revision(Path(vae_path)) if vae_local else "",
    )
    scheduled = model.model_copy(update={"scheduler": given.scheduler})
    train = sections.train.model_copy(update={"model": scheduled})
    return sections.model_copy(
        update={
            "cache_vae": sections.cache_vae.model_copy(update={"model": model}),
            "cache_text_embeds": sections.cache_text_embeds.model_copy(update={"model": model}),
            "train": train,
            "evaluate": sections.evaluate.model_copy(
                update={
                    "model": scheduled,
                    "judge": judge,
                    "judge_revision": folder_revision(Path(judge)) if judge_local else "",
                }
            ),
            "push": sections.push.model_copy(update={"model": scheduled, "training": train.to_json()}),
        }
    )


def _resolve_datasets(sections: Sections, measured: Sequence[Measured]) -> Sections:
    sources = tuple(
        one.entry.source.model_copy(update={"revision": one.revision, "instance_data_dir": str(one.root)})
        for one in measured
    )
    return sections.model_copy(update={"download": sections.download.model_copy(update={"datasets": sources})})


def _summary(sections: Sections, measured: Sequence[Measured], epoch: int, costs: Costs) -> dict[str, object]:
    train = sections.train
    return {
        "model": train.model.path,
        "model_revision": train.model.revision,
        "samples": {one.id: one.samples for one in measured},
        "skipped": {one.id: len(one.skipped) for one in measured},
        "buckets": {one.id: {name: len(sizes) for name, sizes in one.buckets.items()} for one in measured},
        "steps_per_epoch": epoch,
        "max_train_steps": train.max_train_steps or train.num_train_epochs * epoch,
        "epochs": train.num_train_epochs or math.ceil(train.max_train_steps / epoch),
        "latents_bytes": costs.latents_bytes,
        "text_embeds_bytes": costs.text_embeds_bytes,
        "training_memory_bytes": costs.training_memory_bytes,
    }
