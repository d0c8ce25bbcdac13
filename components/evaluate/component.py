"""Kubeflow component: evaluation losses and validation pictures."""

# mypy: disable-error-code="untyped-decorator"
import os
from typing import List  # noqa: UP035 - KFP reads list[...] of artifacts only in this spelling

from kfp import dsl

IMAGE = os.environ.get("KUBETUNER_TRAIN_IMAGE", "ghcr.io/kubetuner/kubetuner-train:0.1.0")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(  # noqa: PLR0913 - each artifact travels by its name
    section: str,
    model: dsl.Input[dsl.Model],
    latents: dsl.Input[List[dsl.Dataset]],  # noqa: UP006
    text_embeds: dsl.Input[List[dsl.Dataset]],  # noqa: UP006
    pictures: dsl.Input[dsl.Dataset],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Compare the trained model with its base.

    Args:
        section: EvaluateSection as JSON, from plan.
        model: What train made.
        latents: What cache_vae made.
        text_embeds: What cache_text_embeds made.
        pictures: Those that download_dataset set aside; read where latents of held-out pictures are not cached.
        evaluation: Losses, pictures and report.
        report: One self-contained page.
        summary: The numbers in short.
        metrics: Evaluation losses and scores.
    """
    import shutil
    from pathlib import Path

    from kubetuner.config.sections.steps import EvaluateSection
    from kubetuner.steps.boundary import facts, write_metrics
    from kubetuner.steps.evaluate import evaluate

    inputs = [Path(a.path) for a in latents], [Path(a.path) for a in text_embeds]
    folder, out = Path(pictures.path), Path(evaluation.path)
    made = evaluate(EvaluateSection.from_json(section), Path(model.path), *inputs, out, dataset=folder)
    evaluation.metadata.update(facts(made))
    shutil.copyfile(f"{evaluation.path}/report.html", report.path)
    shutil.copyfile(f"{evaluation.path}/summary.md", summary.path)
    losses = {"eval_loss_before": made.eval_loss_before, "eval_loss_after": made.eval_loss_after}
    write_metrics(metrics.metadata, Path(metrics.path), losses | made.metrics)
