"""Kubeflow component: train the denoiser or a LoRA."""

# mypy: disable-error-code="untyped-decorator"
import os
from typing import List  # noqa: UP035 - KFP reads list[...] of artifacts only in this spelling

from kfp import dsl

IMAGE = os.environ.get("KUBETUNER_TRAIN_IMAGE", "ghcr.io/kubetuner/kubetuner-train:0.1.0")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    section: str,
    latents: dsl.Input[List[dsl.Dataset]],  # noqa: UP006
    text_embeds: dsl.Input[List[dsl.Dataset]],  # noqa: UP006
    pictures: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train the denoiser or a LoRA on latents and embeddings.

    Args:
        section: TrainSection as JSON, from plan.
        latents: What cache_vae made.
        text_embeds: What cache_text_embeds made.
        pictures: Those that download_dataset set aside; read where latents are made while training.
        model: The trained pipeline or adapter.
        metrics: First and last training loss.
    """
    from pathlib import Path

    from kubetuner.config.sections.steps import TrainSection
    from kubetuner.steps.boundary import facts, write_metrics
    from kubetuner.steps.train import train

    inputs = [Path(a.path) for a in latents], [Path(a.path) for a in text_embeds]
    made = train(TrainSection.from_json(section), *inputs, Path(model.path), dataset=Path(pictures.path))
    model.metadata.update(facts(made))
    losses = {"first_loss": made.first_loss, "last_loss": made.last_loss, "steps": made.steps}
    write_metrics(metrics.metadata, Path(metrics.path), losses)
