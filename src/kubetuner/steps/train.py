"""The ``train`` step: from latents, cached or made meanwhile, and text embeddings to a trained model."""

import logging
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    LOSSES_FILE,
    PIPELINE_FOLDER,
    FileEntry,
    LatentsArtifact,
    ModelArtifact,
    Record,
    TextEmbedsArtifact,
    describe_file,
    list_files,
    read_artifact,
    write_artifact,
    write_rows,
)
from kubetuner.config.sections.steps import TrainSection
from kubetuner.config.trainjob import TrainJobSettings, no_trainjob, trainjob_settings
from kubetuner.digests import fingerprint
from kubetuner.errors import InputError, TrainingError
from kubetuner.imports import importing
from kubetuner.threads import limit_threads

if TYPE_CHECKING:
    from kubetuner.data.latents import Maker
    from kubetuner.tracking import Run
    from kubetuner.training.checkpoints import LossPoint
    from kubetuner.training.distributed.processes import Processes
    from kubetuner.training.loop import Job, Outcome

logger = logging.getLogger(__name__)

WORKER_MODULE = "kubetuner.steps.train_worker"

_TRACKED_PARAMS = (
    "model_type", "layer_freeze_strategy", "max_train_steps", "num_train_epochs", "train_batch_size",
    "gradient_accumulation_steps", "mixed_precision", "base_model_precision", "optimizer", "learning_rate",
    "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "grad_clip_method", "caption_dropout_probability", "seed",
)  # fmt: skip
_TRACKED_OF_DATASETS = ("train_batch_size", "timestep_sampling_offset")
_TRACKED_GROUPS = ("loss", "noise", "timestep_bias", "flow", "rollout", "ema", "fsdp", "compilation")


def train(
    section: TrainSection,
    latents: Sequence[Path],
    text_embeds: Sequence[Path],
    out: Path,
    *,
    dataset: Path | None = None,
) -> ModelArtifact:
    """Train and save a pipeline (full, BitFit too, in ``out/pipeline``) or an adapter (lora, in ``out``).

    Goes on from the latest complete checkpoint of the same settings and inputs. Checkpoints are in the folder
    ``KUBETUNER_CHECKPOINTS``, or else in ``out/checkpoints``, and are removed when the model is complete.

    Several processes are started as children of this one, unless this one is among several that ``torchrun`` started.
    Where ``KUBETUNER_TRAINJOB`` is set, they run on ``num_machines`` others; see :mod:`kubetuner.steps.train_job`.

    Args:
        section: What to train and how.
        latents: Folders of the latents artifacts.
        text_embeds: Folders of the text embeds artifacts.
        out: Folder of the model artifact.
        dataset: Folder of the dataset artifact, or of the pictures set aside; read where ``latents`` leave some to be
            made while training.

    Raises:
        InputError: More processes are asked for than there are GPUs, more machines and nobody says where, or there is
            no store for what is encoded.
        ArtifactError: An input is missing or damaged.
        TrainingError: A loss was not finite, a checkpoint cannot be used, the saved adapter does not load, or one of
            several processes died.
        TerminatedError: SIGTERM arrived; run again to resume.
    """
    with importing():
        from kubetuner.training.distributed.launch import launch, wanted_processes
        from kubetuner.training.distributed.processes import joined

    if (machines := _other_machines(section)) is not None:
        from kubetuner.steps.train_job import train_in_job

        return train_in_job(section, latents, text_embeds, out, machines, dataset=dataset)
    count = wanted_processes(section)
    if count > 1:
        request = WorkerRequest(
            section=section, latents=tuple(latents), text_embeds=tuple(text_embeds), out=out, dataset=dataset
        )
        launch(WORKER_MODULE, request.model_dump_json(), count)
        return read_artifact(out, ModelArtifact)
    with joined(section) as processes:
        return _train(section, Inputs(tuple(latents), tuple(text_embeds), dataset), out, processes)


@dataclass(frozen=True)
class Inputs:
    """Folders of the artifacts before this step; ``dataset`` is read where latents are made while training."""

    latents: tuple[Path, ...]
    text_embeds: tuple[Path, ...]
    dataset: Path | None = None

    def fingerprints(self) -> list[str]:
        """Of what decides the result."""
        made = [read_artifact(folder, LatentsArtifact).fingerprint for folder in self.latents]
        return made + [read_artifact(folder, TextEmbedsArtifact).fingerprint for folder in self.text_embeds]


def _other_machines(section: TrainSection) -> TrainJobSettings | None:
    """The machines that are to train in place of this one, which is none of them."""
    from kubetuner.training.distributed.launch import is_started

    if is_started():
        return None
    settings = trainjob_settings()
    if settings is None and section.num_machines > 1:
        raise InputError(no_trainjob(section.num_machines))
    return settings


class WorkerRequest(Record):
    """The arguments of :func:`train` for one of several processes."""

    section: TrainSection
    latents: tuple[Path, ...]
    text_embeds: tuple[Path, ...]
    out: Path
    dataset: Path | None = None


def _train(section: TrainSection, inputs: Inputs, out: Path, processes: "Processes") -> ModelArtifact:
    """What each process does; the first one writes, and what it made is what all return."""
    with importing():
        import diffusers.models.transformers
        import diffusers.models.unets  # noqa: F401 - the denoiser is in one of the two, and is loaded soon

        from kubetuner.families.on_demand import latent_maker
        from kubetuner.tracking import track
        from kubetuner.training.checkpoints import Checkpoints
        from kubetuner.training.loop import train_denoiser
        from kubetuner.training.saving import gathered

    limit_threads()
    if section.fsdp is not None and processes.count == 1:
        logger.warning("fsdp_enable has no effect: there is one process, so nothing is shared out")
    parents = inputs.fingerprints()
    out.mkdir(parents=True, exist_ok=True)
    key = fingerprint("train", section.deciding_with(processes.count), *parents)
    checkpoints = Checkpoints(*_checkpoints(section, parents, out, processes), section.checkpoints_total_limit)
    with track("train", _params(section, processes.count)) as run:
        with latent_maker(section.model, inputs.latents, inputs.dataset, keep=True) as maker:
            job = _job(section, inputs, processes, maker)
            outcome = train_denoiser(job, checkpoints, run.log_metrics)
        job = gathered(job)
        artifact = _write(job, outcome, out, run, key, parents) if processes.first else None
    if artifact is not None:
        write_artifact(out, artifact)
        checkpoints.remove()
    told = processes.from_first(artifact)
    if told is None:
        raise TrainingError("the first process has told of no model")
    return told


def _checkpoints(section: TrainSection, parents: Sequence[str], out: Path, processes: "Processes") -> tuple[Path, str]:
    """The root of all runs' checkpoints and this run's key, which ends with the batches per optimizer step.

    Any number of processes goes on from them that makes that many batches. Another number of batches is another run,
    as are other settings and other data; where such a run has left checkpoints, they are left alone, and that is said.
    """
    root = Path(os.environ.get("KUBETUNER_CHECKPOINTS") or out / "checkpoints")
    micro_steps = section.gradient_accumulation_steps * processes.count
    run = fingerprint("train", section.deciding_with(0), *parents)  # The same for any number of batches.
    others = sorted(path.parent.name.removeprefix(f"{run}-") for path in root.glob(f"{run}-*/checkpoint-*"))
    if processes.first and others and str(micro_steps) not in others:
        logger.warning(
            "%s holds checkpoints of this run with %s batches per optimizer step; this one makes %d "
            "(gradient_accumulation_steps %d x %d processes) and starts anew; to go on from them, change one of them.",
            root, " and ".join(dict.fromkeys(others)), micro_steps, section.gradient_accumulation_steps,
            processes.count,
        )  # fmt: skip
    elif processes.first and not others and any(root.glob("*/checkpoint-*")):
        logger.info(
            "%s holds checkpoints of other settings or data alone: they are left alone, and training starts anew. "
            "Only the settings and data that a checkpoint was made with go on from it.", root,
        )  # fmt: skip
    return root, f"{run}-{micro_steps}"


def _write(job: "Job", outcome: "Outcome", out: Path, run: "Run", key: str, parents: Sequence[str]) -> ModelArtifact:
    """Put the model and its losses into ``out`` and describe them."""
    _conclude(job, outcome, run)
    uri = _save(job, out, run)
    write_rows(out, LOSSES_FILE, outcome.points)
    first, last = _ends(outcome.points)
    section = job.section
    return ModelArtifact(
        fingerprint=key,
        parents=tuple(parents),
        files=_files(out),
        family=section.model.family,
        model_type=section.model_type,
        base_model=section.model.path,
        base_revision=section.model.revision,
        steps=outcome.steps,
        num_processes=job.processes.count,
        first_loss=first,
        last_loss=last,
        mlflow_model_uri=uri,
        mlflow_run_id=run.run_id,
    )


def _job(section: TrainSection, inputs: Inputs, processes: "Processes", maker: "Maker | None") -> "Job":
    """Load the denoiser and open the caches."""
    import torch

    from kubetuner.data.batches import Batches
    from kubetuner.families import load_family
    from kubetuner.families.loading import default_device
    from kubetuner.families.text import PAD_TO, PAD_TO_COMPILED
    from kubetuner.training.compilation import require_compiler
    from kubetuner.training.denoiser import prepare_denoiser
    from kubetuner.training.loop import Job
    from kubetuner.training.objective import Objective

    device = default_device()
    require_compiler(section.compilation, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    family = load_family(section.model.family)
    tensors = family.facts.text_tensors
    batches = Batches(section, inputs.latents, inputs.text_embeds, tensors, processes.count, maker)
    process = family.noise_process(section.model, section.process())
    bf16 = section.mixed_precision == "bf16"
    regularising = frozenset(dataset.id for dataset in section.datasets if dataset.is_regularisation_data)
    return Job(
        section=section,
        denoiser=prepare_denoiser(section, family, device),
        objective=Objective(
            family,
            process,
            batches.null,
            section.seed,
            bf16,
            noise=section.noise,
            regularising=regularising,
            masked=section.masked_loss_probability,
            rollout=section.rollout,
            drawing={
                one.id: family.noise_process(section.model, section.process(one))
                for one in section.datasets
                if one.timestep_sampling_offset
            },
            pad_text_to=PAD_TO if section.compilation is None else PAD_TO_COMPILED,
            whole_batches=section.compilation is not None,
        ),
        batches=batches,
        epochs=batches.epochs,
        total_steps=_total_steps(section, batches.batches_per_epoch, processes.count),
        device=device,
        processes=processes,
    )


def _conclude(job: "Job", outcome: "Outcome", run: "Run") -> None:
    """Say and track what the whole of the training took."""
    from kubetuner.training.memory.peak import peak_memory_metric

    name = peak_memory_metric(job.device)
    metrics = {name: float(outcome.peak_memory_bytes)}
    said = f"{outcome.peak_memory_bytes / 1e9:.2f} GB {name.removesuffix('_bytes').replace('_', ' ')}"
    if outcome.graphs is not None:
        metrics["compiled_graphs"] = outcome.graphs.made
        said += f"; {outcome.graphs}"
    run.log_metrics(metrics, outcome.steps)
    logger.info("Trained to step %d: %s", outcome.steps, said)


def _total_steps(section: TrainSection, batches_per_epoch: int, processes: int) -> int:
    """Optimizer steps; an epoch's last step may have batches of the next epoch."""
    if section.max_train_steps > 0:
        return section.max_train_steps
    return section.num_train_epochs * math.ceil(batches_per_epoch / (section.gradient_accumulation_steps * processes))


def _ends(points: Sequence["LossPoint"]) -> tuple[float, float]:
    """Mean loss over the first and over the last tenth of what was logged: one step's loss is mostly noise."""
    count = math.ceil(len(points) / 10)
    losses = [point.loss for point in points]
    return statistics.fmean(losses[:count]), statistics.fmean(losses[-count:])


def _save(job: "Job", out: Path, run: "Run") -> str:
    """Put the model into ``out`` and track it; returns its MLflow URI or an empty text."""
    from kubetuner.training.saving import save_adapter, save_pipeline

    name = f"{job.section.model.family}-{job.section.model_type}"
    if job.section.model_type == "full":
        return run.log_model(save_pipeline(job, out), name)
    with tempfile.TemporaryDirectory(dir=out, prefix=".adapter.") as folder:
        save_adapter(job, Path(folder))
        uri = run.log_model(Path(folder), name)
        for path in Path(folder).iterdir():
            path.replace(out / path.name)
    return uri


def _files(out: Path) -> tuple[FileEntry, ...]:
    """The payload: files in ``out`` and the pipeline, but not the checkpoints."""
    names = (path.name for path in out.iterdir() if path.is_file() and path.name != ARTIFACT_FILE)
    top = (describe_file(out, name) for name in sorted(names) if not name.startswith("."))
    nested = list_files(out / PIPELINE_FOLDER)
    return (*top, *(entry.model_copy(update={"path": f"{PIPELINE_FOLDER}/{entry.path}"}) for entry in nested))


def _params(section: TrainSection, processes: int) -> dict[str, str]:
    """What the tracked run shows of the settings, LoRA and base included."""
    values = section.model_dump(mode="json", include=set(_TRACKED_PARAMS))
    values |= {"model_family": section.model.family, "base_model": section.model.path}
    values |= {"num_train_processes": processes}
    for name in _TRACKED_OF_DATASETS:
        own = [f"{one.id} {getattr(one, name)}" for one in section.datasets if getattr(one, name)]
        values |= {f"dataset_{name}": ", ".join(own)} if own else {}
    for group in _TRACKED_GROUPS:
        chosen = getattr(section, group)
        if chosen is not None and chosen != TrainSection.model_fields[group].default:
            values |= {f"{group}_{name}": value for name, value in chosen.model_dump(mode="json").items()}
    if section.lora is not None:
        values |= {f"lora_{name}": value for name, value in section.lora.model_dump(mode="json").items()}
    return {name: str(value) for name, value in values.items()}
