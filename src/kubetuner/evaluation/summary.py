"""``summary.json``: what a run did and what came of it, for scripts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kubetuner.artifacts import EvaluationArtifact, ModelArtifact, Record, read_artifact, write_text
from kubetuner.evaluation.tracked import weights_folder

SUMMARY_FILE = "summary.json"


class TrainLoss(Record):
    """Mean training loss over the first and over the last tenth of the logged steps."""

    first: float
    last: float


class EvalLossPair(Record):
    """Evaluation loss of the base and of the trained model; ``None`` without held-out data."""

    before: float | None
    after: float | None


class SummaryImage(Record):
    """One prompt's pictures; paths are absolute."""

    prompt: str
    seed: int
    before: str
    after: str


class RunSummary(Record):
    """What a run did and what came of it.

    Attributes:
        family: ``pixart_sigma``, ``sdxl`` or ``sana``.
        model_type: ``full`` or ``lora``.
        steps: Optimizer steps.
        train_loss: Training loss.
        eval_loss: Fixed-noise evaluation loss.
        images: Pictures before and after.
        seconds: Wall seconds per step, by step name.
        cache_hits: Steps whose result was taken from the cache.
        mlflow_run_id: The train step's run, empty when not tracked.
        model_path: What diffusers loads: a pipeline folder (full) or the folder of an adapter (lora).
        pushed_to: URL or folder the model was published to, empty when it was not.
    """

    family: str
    model_type: str
    steps: int
    train_loss: TrainLoss
    eval_loss: EvalLossPair
    images: tuple[SummaryImage, ...]
    seconds: dict[str, float]
    cache_hits: tuple[str, ...]
    mlflow_run_id: str
    model_path: str
    pushed_to: str


def write_summary(
    out_dir: Path,
    *,
    model: Path,
    evaluation: Path,
    seconds: Mapping[str, float],
    cache_hits: Sequence[str] = (),
    pushed_to: str = "",
) -> RunSummary:
    """Write ``out_dir/summary.json`` from the run's artifacts.

    Args:
        out_dir: Where to write.
        model: Folder of the model artifact.
        evaluation: Folder of the evaluation artifact.
        seconds: Wall seconds per step.
        cache_hits: Steps whose result was taken from the cache.
        pushed_to: Where the model was published.

    Raises:
        ArtifactError: One of the two artifacts is missing or of another kind.
    """
    trained = read_artifact(model, ModelArtifact)
    evaluated = read_artifact(evaluation, EvaluationArtifact)
    summary = RunSummary(
        family=trained.family,
        model_type=trained.model_type,
        steps=trained.steps,
        train_loss=TrainLoss(first=trained.first_loss, last=trained.last_loss),
        eval_loss=EvalLossPair(before=evaluated.eval_loss_before, after=evaluated.eval_loss_after),
        images=tuple(
            SummaryImage(
                prompt=image.prompt,
                seed=image.seed,
                before=str((evaluation / image.before).resolve()),
                after=str((evaluation / image.after).resolve()),
            )
            for image in evaluated.images
        ),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        cache_hits=tuple(cache_hits),
        mlflow_run_id=trained.mlflow_run_id,
        model_path=str(weights_folder(model, trained).resolve()),
        pushed_to=pushed_to,
    )
    write_text(out_dir / SUMMARY_FILE, summary.model_dump_json(indent=2) + "\n")
    return summary
