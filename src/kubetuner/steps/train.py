"""The ``train`` step: from cached latents and text embeddings to a trained model."""

import logging
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    LOSSES_FILE,
    PIPELINE_FOLDER,
    FileEntry,
    LatentsArtifact,
    ModelArtifact,
    TextEmbedsArtifact,
    describe_file,
    fingerprint,
    list_files,
    read_artifact,
    write_artifact,
    write_rows,
)
from kubetuner.config.sections import TrainSection

if TYPE_CHECKING:
    from kubetuner.tracking import Run
    from kubetuner.training.checkpoints import LossPoint
    from kubetuner.training.loop import Job, Outcome

logger = logging.getLogger(__name__)

_TRACKED_PARAMS = (
    "model_type", "layer_freeze_strategy", "max_train_steps", "num_train_epochs", "train_batch_size",
    "gradient_accumulation_steps", "mixed_precision", "base_model_precision", "optimizer", "learning_rate",
    "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "grad_clip_method", "caption_dropout_probability", "seed",
)  # fmt: skip
_TRACKED_GROUPS = ("loss", "noise", "timestep_bias", "flow", "ema", "compilation")


def train(section: TrainSection, latents: Sequence[Path], text_embeds: Sequence[Path], out: Path) -> ModelArtifact:
    """Train and save a pipeline (full, BitFit too, in ``out/pipeline``) or an adapter (lora, in ``out``).

    Goes on from the latest complete checkpoint of the same settings and inputs. Checkpoints are in the folder
    ``KUBETUNER_CHECKPOINTS``, or else in ``out/checkpoints``, and are removed when the model is complete.

    Args:
        section: What to train and how.
        latents: Folders of the latents artifacts.
        text_embeds: Folders of the text embeds artifacts.
        out: Folder of the model artifact.

    Raises:
        ArtifactError: An input is missing or damaged.
        TrainingError: A loss was not finite, a checkpoint cannot be used, or the saved adapter does not load.
        TerminatedError: SIGTERM arrived; run again to resume.
    """
    from kubetuner.tracking import track
    from kubetuner.training.checkpoints import Checkpoints
    from kubetuner.training.loop import train_denoiser
    from kubetuner.training.threads import limit_threads

    limit_threads()
    parents = [read_artifact(folder, LatentsArtifact).fingerprint for folder in latents]
    parents += [read_artifact(folder, TextEmbedsArtifact).fingerprint for folder in text_embeds]
    out.mkdir(parents=True, exist_ok=True)
    key = fingerprint("train", section.deciding(), *parents)
    root = Path(os.environ.get("KUBETUNER_CHECKPOINTS") or out / "checkpoints")
    checkpoints = Checkpoints(root, key, section.checkpoints_total_limit)
    with track("train", _params(section)) as run:
        job = _job(section, latents, text_embeds)
        outcome = train_denoiser(job, checkpoints, run.log_metrics)
        _conclude(job, outcome, run)
        uri = _save(job, out, run)
        write_rows(out, LOSSES_FILE, outcome.points)
        first, last = _ends(outcome.points)
        artifact = ModelArtifact(
            fingerprint=key,
            parents=tuple(parents),
            files=_files(out),
            family=section.model.family,
            model_type=section.model_type,
            base_model=section.model.path,
            base_revision=section.model.revision,
            steps=outcome.steps,
            first_loss=first,
            last_loss=last,
            mlflow_model_uri=uri,
            mlflow_run_id=run.run_id,
        )
    write_artifact(out, artifact)
    checkpoints.remove()
    return artifact


def _job(section: TrainSection, latents: Sequence[Path], text_embeds: Sequence[Path]) -> "Job":
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
    batches = Batches(section, latents, text_embeds, family.facts.text_tensors)
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
            section.noise,
            regularising,
            pad_text_to=PAD_TO if section.compilation is None else PAD_TO_COMPILED,
        ),
        batches=batches,
        epochs=batches.epochs,
        total_steps=_total_steps(section, batches.batches_per_epoch),
        device=device,
    )


def _conclude(job: "Job", outcome: "Outcome", run: "Run") -> None:
    """Say and track what the whole of the training took."""
    from kubetuner.training.memory import peak_memory_metric

    name = peak_memory_metric(job.device)
    metrics = {name: float(outcome.peak_memory_bytes)}
    said = f"{outcome.peak_memory_bytes / 1e9:.2f} GB {name.removesuffix('_bytes').replace('_', ' ')}"
    if outcome.graphs is not None:
        metrics["compiled_graphs"] = outcome.graphs.made
        said += f"; {outcome.graphs}"
    run.log_metrics(metrics, outcome.steps)
    logger.info("Trained to step %d: %s", outcome.steps, said)


def _total_steps(section: TrainSection, batches_per_epoch: int) -> int:
    """Optimizer steps; an epoch's last step may have batches of the next epoch."""
    if section.max_train_steps > 0:
        return section.max_train_steps
    return section.num_train_epochs * math.ceil(batches_per_epoch / section.gradient_accumulation_steps)


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


def _params(section: TrainSection) -> dict[str, str]:
    """What the tracked run shows of the settings, LoRA and base included."""
    values = section.model_dump(mode="json", include=set(_TRACKED_PARAMS))
    values |= {"model_family": section.model.family, "base_model": section.model.path}
    for group in _TRACKED_GROUPS:
        chosen = getattr(section, group)
        if chosen is not None and chosen != TrainSection.model_fields[group].default:
            values |= {f"{group}_{name}": value for name, value in chosen.model_dump(mode="json").items()}
    if section.lora is not None:
        values |= {f"lora_{name}": value for name, value in section.lora.model_dump(mode="json").items()}
    return {name: str(value) for name, value in values.items()}
