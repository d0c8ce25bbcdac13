import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kubetuner.artifacts import EvaluationArtifact, ModelArtifact, ValidationImage, write_artifact
from kubetuner.config.sections.steps import EvaluateSection
from kubetuner.evaluation.eval_loss import EvalLoss, LevelLoss
from kubetuner.evaluation.report import (
    MAX_REPORT_BYTES,
    Findings,
    StepLine,
    TrainPoint,
    headline,
    number,
    render_html,
    render_markdown,
)
from kubetuner.evaluation.summary import write_summary

Drawn = Callable[[int, int], tuple[ValidationImage, ...]]


def _loss(mean: float) -> EvalLoss:
    levels = tuple(LevelLoss(float(level), mean * level / 500) for level in range(0, 1000, 100))
    return EvalLoss(mean, {"low": mean, "middle": mean, "high": mean}, {"rings": mean}, levels, 2)


@pytest.fixture
def findings(section: EvaluateSection, model: ModelArtifact, drawn: Drawn, tmp_path: Path) -> Findings:
    return Findings(
        section=section,
        model=model,
        before=_loss(0.4),
        after=_loss(0.1),
        images=drawn(2, 64),
        verdicts=("Could not draw it before, can now", "Could draw it before, still can"),
        notes=("A <note>.",),
        steps=(StepLine("train", "300 steps", "a" * 64),),
        training=tuple(TrainPoint(step=step, loss=1 / step) for step in range(1, 50)),
        folder=tmp_path,
    )


class _Balance(HTMLParser):
    """Every tag that opens also closes."""

    VOID = frozenset({"meta", "img", "br", "line", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_wellformed_file_that_loads_nothing(findings: Findings) -> None:
    html = render_html(findings)
    parser = _Balance()
    parser.feed(html)

    assert parser.open == []
    assert len(parser.sources) == 4
    assert all(source.startswith("data:image/webp;base64,") for source in parser.sources)
    assert "<script" not in html
    assert "url(" not in html
    assert html.count('<svg viewBox="0 0 720') == 2, "training loss, and loss by noise level"


def test_the_report_escapes_and_says_what_was_found(findings: Findings) -> None:
    html = render_html(findings)

    assert "prompt &lt;0&gt; | x" in html
    assert "A &lt;note&gt;." in html
    assert "Could not draw it before, can now" in html
    assert "−75.0 %" in html
    assert "80.0" in html
    assert "a" * 12 in html


@pytest.mark.parametrize(("count", "edge"), [(12, 1024), (120, 160)])
def test_the_report_stays_small(findings: Findings, drawn: Drawn, count: int, edge: int) -> None:
    many = replace(findings, images=drawn(count, edge), verdicts=("",) * count)
    html = render_html(many)

    assert len(html.encode()) < MAX_REPORT_BYTES
    assert ("more pictures are in images/" in html) == (count == 120)


def test_a_report_of_almost_nothing(findings: Findings) -> None:
    bare = replace(findings, before=None, after=None, images=(), verdicts=(), training=(), steps=())
    html = render_html(bare)

    assert "<h2>Curves" not in html
    assert "<h2>Before and after" not in html
    assert headline(bare) == "pixart_sigma: 300 steps"
    assert "Training loss" in render_markdown(bare)


def test_a_broken_models_loss_is_shown_as_not_finite(findings: Findings) -> None:
    broken = replace(findings, after=_loss(float("nan")), verdicts=("", ""))

    assert "not finite" in render_html(broken)
    assert headline(broken) == "pixart_sigma: 300 steps"


def test_markdown_has_no_html_and_whole_tables(findings: Findings) -> None:
    text = render_markdown(findings)

    assert headline(findings) in text
    assert "prompt <0> \\| x" in text
    rows = [line for line in text.splitlines() if line.startswith("| prompt <")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 7 for row in rows)


def test_headline_falls_back_to_the_loss(findings: Findings) -> None:
    assert headline(findings) == "Learned to draw 1 of 2 prompts"
    assert headline(replace(findings, verdicts=("", ""))) == "Evaluation loss 0.4000 → 0.1000 (−75.0 %)"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.123456, "0.1235"), (12345.0, "1.234e+04"), (80.0, "80.00"), (0.0, "0.000")]
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_summary_json(model: ModelArtifact, drawn: Drawn, tmp_path: Path) -> None:
    images = drawn(1, 64)
    (tmp_path / "model").mkdir()
    write_artifact(tmp_path / "model", model)
    evaluation = EvaluationArtifact(
        fingerprint="e", eval_loss_before=0.5, eval_loss_after=None, metrics={}, images=images
    )
    write_artifact(tmp_path / "evaluation", evaluation)

    write_summary(
        tmp_path,
        model=tmp_path / "model",
        evaluation=tmp_path / "evaluation",
        seconds={"train": 1.23456},
        cache_hits=["plan"],
    )

    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "family": "pixart_sigma",
        "model_type": "full",
        "steps": 300,
        "train_loss": {"first": 0.5, "last": 0.125},
        "eval_loss": {"before": 0.5, "after": None},
        "images": [
            {
                "prompt": "prompt <0> | x",
                "seed": 1,
                "before": str(tmp_path / "evaluation/images/0_before.png"),
                "after": str(tmp_path / "evaluation/images/0_after.png"),
            }
        ],
        "seconds": {"train": 1.235},
        "cache_hits": ["plan"],
        "mlflow_run_id": "run1",
        "model_path": str(tmp_path / "model"),
        "pushed_to": "",
    }
