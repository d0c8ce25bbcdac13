"""``report.html`` (one file, pictures inside, no scripts) and ``summary.md`` of an evaluation."""

import base64
import io
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from pydantic import ConfigDict

from kubetuner.artifacts import ModelArtifact, Record, ValidationImage
from kubetuner.config.sections.steps import EvaluateSection
from kubetuner.evaluation.charts import Chart, line_chart, smoothed
from kubetuner.evaluation.eval_loss import BANDS, EvalLoss

logger = logging.getLogger(__name__)

MAX_REPORT_BYTES = 1_500_000
_PICTURE_BUDGET = 1_250_000
_EDGES = (512, 384, 256, 192, 128, 96)
_LOSSLESS_EDGE = 128
_TRIAL_CARDS = 6


class TrainPoint(Record):
    """A row of a model's ``losses.jsonl``; fields that it does not need are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    loss: float
    lr: float = 0.0


@dataclass(frozen=True)
class StepLine:
    """One step of the run in the report's table."""

    name: str
    result: str
    fingerprint: str


@dataclass(frozen=True)
class Findings:
    """Everything a report shows.

    Attributes:
        section: The evaluation's settings.
        model: The trained model.
        before: Evaluation loss of the base.
        after: Evaluation loss of the trained model.
        images: Pictures before and after; paths relative to ``folder``.
        verdicts: One per picture, empty where there is no judge.
        notes: What a reader has to know, such as what could not be measured.
        steps: The run's steps.
        training: Logged training losses, if there are any.
        folder: The evaluation artifact's folder.
    """

    section: EvaluateSection
    model: ModelArtifact
    before: EvalLoss | None
    after: EvalLoss | None
    images: tuple[ValidationImage, ...]
    verdicts: tuple[str, ...]
    notes: tuple[str, ...]
    steps: tuple[StepLine, ...]
    training: tuple[TrainPoint, ...]
    folder: Path


@dataclass(frozen=True)
class _Card:
    """One prompt at one seed and size, as the template shows it."""

    image: ValidationImage
    verdict: str
    tone: str
    before: str
    after: str


def render_html(findings: Findings) -> str:
    """The report as one self-contained HTML file below :data:`MAX_REPORT_BYTES`."""
    environment = Environment(
        loader=PackageLoader("kubetuner.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    cards, left_out = _cards(findings)
    notes = [*findings.notes]
    if left_out:
        notes.append(f"{left_out} more pictures are in images/; the report would be too large with them.")
    return environment.get_template("report.html.jinja").render(
        findings=findings,
        headline=headline(findings),
        notes=notes,
        cards=cards,
        rows=loss_rows(findings),
        charts=_charts(findings),
        settings=settings_of(findings),
        scored=any(image.clip_score_after is not None for image in findings.images),
    )


def render_markdown(findings: Findings) -> str:
    """The same in short, for Kubeflow's Markdown view: no HTML, no pictures."""
    lines = [f"# {headline(findings)}", ""]
    model = findings.model
    lines += [f"{model.family} ({model.model_type}), {model.steps} steps from `{model.base_model}`.", ""]
    lines += ["| | before | after | change |", "|---|---:|---:|---:|"]
    lines += [f"| {_cell(name)} | {number(b)} | {number(a)} | {c} |" for name, b, a, c in loss_rows(findings)]
    if findings.images:
        lines += ["", "| prompt | seed | size | CLIP before | CLIP after | verdict |", "|---|---:|---|---:|---:|---|"]
        for image, judged in zip(findings.images, findings.verdicts, strict=True):
            scores = f"{number(image.clip_score_before)} | {number(image.clip_score_after)}"
            size = f"{image.width}x{image.height}"
            lines.append(f"| {_cell(image.prompt)} | {image.seed} | {size} | {scores} | {judged or '–'} |")
    if findings.notes:
        lines += ["", *(f"- {note}" for note in findings.notes)]
    return "\n".join(lines) + "\n"


def headline(findings: Findings) -> str:
    """The most important result, in one line."""
    learned = {i.prompt for i, v in zip(findings.images, findings.verdicts, strict=True) if v.endswith("can now")}
    prompts = {image.prompt for image in findings.images}
    if learned:
        return f"Learned to draw {len(learned)} of {len(prompts)} prompts"
    before, after = findings.before, findings.after
    if before and after and before.finite and after.finite:
        change = _change(before.mean, after.mean)
        return f"Evaluation loss {number(before.mean)} → {number(after.mean)} ({change})"
    return f"{findings.model.family}: {findings.model.steps} steps"


def loss_rows(findings: Findings) -> list[tuple[str, float | None, float | None, str]]:
    """Name, before, after and change of each number that has both."""
    rows: list[tuple[str, float | None, float | None, str]] = []
    before, after = findings.before, findings.after
    if before and after:
        rows.append(_row("Evaluation loss", before.mean, after.mean))
        bands = [band for band in BANDS if band in after.bands]
        rows += [_row(f"… {band} noise", before.bands[band], after.bands[band]) for band in bands if len(bands) > 1]
        if len(after.datasets) > 1:
            rows += [_row(f"… {name}", before.datasets[name], after.datasets[name]) for name in after.datasets]
    scores = [(image.clip_score_before, image.clip_score_after) for image in findings.images]
    pairs = [(b, a) for b, a in scores if b is not None and a is not None]
    if pairs:
        first, last = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        rows.append(("Mean CLIP score", first, last, f"{last - first:+.1f} points".replace("-", "−")))
    rows.append(_row("Training loss (first and last tenth)", findings.model.first_loss, findings.model.last_loss))
    return rows


def settings_of(findings: Findings) -> list[tuple[str, str]]:
    """The settings that a reader needs to judge or repeat the evaluation."""
    section, model = findings.section, findings.model
    settings = [
        ("base model", model.base_model),
        ("base revision", model.base_revision or "–"),
        ("model_type", model.model_type),
        ("optimizer steps", str(model.steps)),
        ("mixed_precision", section.mixed_precision),
        ("held-out datasets", ", ".join(section.eval_datasets) or "none"),
        ("num_eval_images", str(section.num_eval_images)),
        ("eval_timesteps", str(section.eval_timesteps)),
        ("resolutions", ", ".join(f"{width}x{height}" for width, height in section.resolutions)),
        ("guidance", f"{section.guidance:g}"),
        ("inference steps", str(section.num_inference_steps)),
        ("seed", str(section.seed)),
        ("negative prompt", section.negative_prompt or "–"),
        ("judge", section.judge if section.evaluation_type == "clip" else "none"),
    ]
    if model.mlflow_run_id:
        settings.append(("MLflow run of the training", model.mlflow_run_id))
    if model.mlflow_model_uri:
        settings.append(("MLflow model", model.mlflow_model_uri))
    return settings


def number(value: float | None) -> str:
    """Four significant digits, or a dash."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:#.4g}".rstrip(".")


def _row(name: str, before: float, after: float) -> tuple[str, float | None, float | None, str]:
    return name, before, after, _change(before, after)


def _change(before: float, after: float) -> str:
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return "–"
    return f"{100 * (after - before) / abs(before):+.1f} %".replace("-", "−")


def _charts(findings: Findings) -> list[Chart]:
    points = [(float(point.step), point.loss) for point in findings.training if math.isfinite(point.loss)]
    charts = [
        line_chart("Training loss", "step", [("each step", "faint", points), ("smoothed", "after", smoothed(points))])
    ]
    if findings.before and findings.after:
        series = [
            (name, name, [(level.level, level.loss) for level in result.levels])
            for name, result in (("before", findings.before), ("after", findings.after))
        ]
        charts.append(line_chart("Evaluation loss by noise level", "noise level", series))
    return [chart for chart in charts if chart is not None]


def _cards(findings: Findings) -> tuple[list[_Card], int]:
    """Cards with pictures as large as the budget allows, and how many did not fit at all."""
    count = len(findings.images)
    if not count:
        return [], 0
    spread = range(0, count, max(1, count // _TRIAL_CARDS))
    for edge in _EDGES:
        trial = _size([_card(findings, index, edge) for index in spread])
        if trial * count > _PICTURE_BUDGET * len(spread) and edge != _EDGES[-1]:
            continue
        cards = [_card(findings, index, edge) for index in range(count)]
        if _size(cards) <= _PICTURE_BUDGET:
            return cards, 0
    kept = list(cards)
    while _size(kept) > _PICTURE_BUDGET:
        kept.pop()
    logger.warning("the report shows %d of %d pictures; all are in images/", len(kept), count)
    return kept, count - len(kept)


def _card(findings: Findings, index: int, edge: int) -> _Card:
    image, judged = findings.images[index], findings.verdicts[index]
    tone = "good" if judged.endswith("can now") or judged.startswith("Closer") else ""
    if judged.endswith("cannot now") or judged.startswith("Further"):
        tone = "bad"
    before, after = (_data_uri(findings.folder / path, edge) for path in (image.before, image.after))
    return _Card(image, judged, tone, before, after)


def _size(cards: Sequence[_Card]) -> int:
    return sum(len(card.before) + len(card.after) + len(card.image.prompt) + 800 for card in cards)


def _data_uri(path: Path, edge: int) -> str:
    """The picture as a ``data:`` URI: small ones as they are, larger ones as WebP of at most ``edge`` pixels."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    small = max(picture.size) <= min(_LOSSLESS_EDGE, edge)
    picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82, lossless=small, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
