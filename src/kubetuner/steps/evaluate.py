"""The ``evaluate`` step: compare the base with the trained model and write the report."""

import logging
import math
import re
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kubetuner.artifacts import (
    LOSSES_FILE,
    EvaluationArtifact,
    LatentsArtifact,
    ModelArtifact,
    TextEmbedsArtifact,
    list_files,
    read_artifact,
    read_rows,
    write_artifact,
    write_text,
)
from kubetuner.config.sections.steps import EvaluateSection
from kubetuner.digests import fingerprint
from kubetuner.errors import ArtifactError
from kubetuner.imports import importing
from kubetuner.threads import limit_threads

if TYPE_CHECKING:
    from kubetuner.evaluation.compare import Comparison
    from kubetuner.evaluation.held_out import HeldOut
    from kubetuner.evaluation.report import Findings, StepLine, TrainPoint

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.md"


def evaluate(
    section: EvaluateSection,
    model: Path,
    latents: Sequence[Path],
    text_embeds: Sequence[Path],
    out: Path,
    *,
    dataset: Path | None = None,
) -> EvaluationArtifact:
    """Measure the evaluation loss, draw and score validation pictures, and write ``report.html`` and ``summary.md``.

    Args:
        section: What to evaluate and how.
        model: Folder of the model artifact; the tracked model is preferred where it was tracked.
        latents: Folders of the latents artifacts.
        text_embeds: Folders of the text embeds artifacts.
        out: Folder of the evaluation artifact.
        dataset: Folder of the dataset artifact, or of the pictures set aside; read where latents of held-out pictures
            are not cached.

    Raises:
        ArtifactError: An input is missing or damaged, or the model is not of the section's family and type.
    """
    from kubetuner.evaluation.tracked import locate_trained
    from kubetuner.tracking import track

    trained = read_artifact(model, ModelArtifact)
    _check(section, trained, model)
    shutil.rmtree(out / "images", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    params = {"model_family": section.model.family, "model_type": section.model_type, "judge": section.judge}
    with track("evaluate", params) as run:
        with tempfile.TemporaryDirectory(prefix="kubetuner-model-") as scratch:
            located = locate_trained(model, trained, Path(scratch))
            held_out = _held_out(section, latents, text_embeds, dataset)
            comparison = _compare(section, located.folder, held_out, out)
        steps = _step_lines(trained, latents, text_embeds)
        notes = _notes(section, comparison, located.note)
        findings = _findings(section, trained, comparison, (steps, notes), model, out)
        _write_reports(findings, out)
        artifact = _artifact(section, trained, comparison, (latents, text_embeds), out)
        run.log_metrics(artifact.metrics, trained.steps)
        for image in artifact.images:
            for path in (image.before, image.after):
                run.log_image(Path(path).stem, out / path, trained.steps)
        run.log_text((out / REPORT_FILE).read_text(encoding="utf-8"), REPORT_FILE)
        run.log_text((out / SUMMARY_FILE).read_text(encoding="utf-8"), SUMMARY_FILE)
    write_artifact(out, artifact)
    logger.info("evaluated: %s", out / REPORT_FILE)
    return artifact


def metrics_of(comparison: "Comparison") -> dict[str, float]:
    """Every finite number, by a name that MLflow accepts."""
    metrics: dict[str, float] = {}
    for moment, loss in (("before", comparison.before), ("after", comparison.after)):
        if loss is not None:
            metrics[f"eval_loss/{moment}"] = loss.mean
            metrics |= {f"eval_loss/{band}_noise/{moment}": value for band, value in loss.bands.items()}
            metrics |= {f"eval_loss/dataset/{_safe(name)}/{moment}": value for name, value in loss.datasets.items()}
    for moment in ("before", "after"):
        scores = [getattr(image, f"clip_score_{moment}") for image in comparison.images]
        known = [score for score in scores if score is not None]
        if known:
            metrics |= {
                f"clip/min/{moment}": min(known),
                f"clip/mean/{moment}": statistics.fmean(known),
                f"clip/max/{moment}": max(known),
            }
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _check(section: EvaluateSection, trained: ModelArtifact, model: Path) -> None:
    got, expected = (trained.family, trained.model_type), (section.model.family, section.model_type)
    if got != expected:
        raise ArtifactError(
            f"{model} is a {got[0]} model ({got[1]}), and the settings are of {expected[0]} ({expected[1]}); "
            "evaluate with the settings it was trained with"
        )


def _held_out(
    section: EvaluateSection, latents: Sequence[Path], text_embeds: Sequence[Path], dataset: Path | None
) -> "HeldOut | None":
    with importing():
        import diffusers.models.transformers
        import diffusers.models.unets  # noqa: F401 - the denoiser is in one of the two, and is loaded soon

        from kubetuner.evaluation.held_out import read_held_out
        from kubetuner.families import load_family

    names = load_family(section.model.family).facts.text_tensors
    return read_held_out(section, latents, text_embeds, names, dataset)


def _compare(section: EvaluateSection, weights: Path, held_out: "HeldOut | None", out: Path) -> "Comparison":
    from kubetuner.evaluation.compare import compare
    from kubetuner.families.loading import default_device

    limit_threads()
    return compare(section, weights, held_out, default_device(), out)


def _step_lines(trained: ModelArtifact, latents: Sequence[Path], text_embeds: Sequence[Path]) -> tuple["StepLine", ...]:
    from kubetuner.evaluation.report import StepLine, number

    lines = []
    for folder in latents:
        cached = read_artifact(folder, LatentsArtifact)
        others = (("left to training", cached.left), ("skipped", len(cached.skipped)))
        more = "".join(f", {count} {what}" for what, count in others if count)
        result = f"{cached.num_samples} pictures: {cached.encoded} encoded, {cached.reused} reused{more}"
        lines.append(StepLine("cache_vae", result, cached.fingerprint))
    for folder in text_embeds:
        texts = read_artifact(folder, TextEmbedsArtifact)
        result = f"{texts.num_texts} texts: {texts.encoded} encoded, {texts.reused} reused"
        lines.append(StepLine("cache_text_embeds", result, texts.fingerprint))
    loss = f"training loss {number(trained.first_loss)} → {number(trained.last_loss)}"
    return (*lines, StepLine("train", f"{trained.steps} steps, {loss}", trained.fingerprint))


def _notes(section: EvaluateSection, comparison: "Comparison", tracked: str) -> tuple[str, ...]:
    """What a reader must know before trusting the numbers."""
    notes = [tracked] if tracked else []
    if not section.eval_datasets:
        notes.append(
            "No evaluation loss: the data file has no held-out dataset. Add one with dataset_type eval to see "
            "whether the model gets better on pictures it was not trained on."
        )
    elif comparison.after is None:
        notes.append(f"No evaluation loss: no usable picture in {', '.join(section.eval_datasets)}.")
    else:
        missing = [name for name in section.eval_datasets if name not in comparison.after.datasets]
        notes += [f"No usable picture in the held-out dataset {name}." for name in missing]
    for moment, loss in (("base", comparison.before), ("trained", comparison.after)):
        if loss is not None and not loss.finite:
            notes.append(f"The evaluation loss of the {moment} model is not finite: that model is broken.")
    if not comparison.images:
        notes.append("No pictures: there is no validation prompt.")
    elif section.evaluation_type == "none":
        notes.append("Pictures were not scored: evaluation_type is none.")
    rounded = ", ".join(f"{key} {name}" for key, name in section.rounding.named().items())
    if rounded and comparison.images:
        notes.append(f"Pictures were drawn with rounded text encoders, as captions were cached: {rounded}.")
    notes += [f"The judge read only the beginning of {prompt!r}." for prompt in comparison.truncated]
    return tuple(notes)


def _findings(
    section: EvaluateSection,
    trained: ModelArtifact,
    comparison: "Comparison",
    said: tuple[tuple["StepLine", ...], tuple[str, ...]],
    model: Path,
    out: Path,
) -> "Findings":
    from kubetuner.evaluation.report import Findings

    return Findings(
        section=section,
        model=trained,
        before=comparison.before,
        after=comparison.after,
        images=comparison.images,
        verdicts=comparison.verdicts,
        steps=said[0],
        notes=said[1],
        training=_training(model),
        folder=out,
    )


def _training(model: Path) -> tuple["TrainPoint", ...]:
    from kubetuner.evaluation.report import TrainPoint

    return tuple(read_rows(model, LOSSES_FILE, TrainPoint)) if (model / LOSSES_FILE).is_file() else ()


def _write_reports(findings: "Findings", out: Path) -> None:
    from kubetuner.evaluation.report import render_html, render_markdown

    for name, text in ((REPORT_FILE, render_html(findings)), (SUMMARY_FILE, render_markdown(findings))):
        write_text(out / name, text)


def _artifact(
    section: EvaluateSection,
    trained: ModelArtifact,
    comparison: "Comparison",
    caches: tuple[Sequence[Path], Sequence[Path]],
    out: Path,
) -> EvaluationArtifact:
    parents = [trained.fingerprint]
    parents += [read_artifact(folder, LatentsArtifact).fingerprint for folder in caches[0]]
    parents += [read_artifact(folder, TextEmbedsArtifact).fingerprint for folder in caches[1]]
    before, after = (
        loss.mean if loss is not None and loss.finite else None for loss in (comparison.before, comparison.after)
    )
    return EvaluationArtifact(
        fingerprint=fingerprint("evaluate", section.deciding(), *parents),
        parents=tuple(parents),
        files=list_files(out),
        eval_loss_before=before,
        eval_loss_after=after,
        metrics=metrics_of(comparison),
        images=comparison.images,
    )


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_. -]", "_", name)
