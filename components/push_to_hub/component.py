"""Kubeflow component: publish the model with its card."""

# mypy: disable-error-code="untyped-decorator"
import os

from kfp import dsl

IMAGE = os.environ.get("KUBETUNER_BASE_IMAGE", "ghcr.io/kubetuner/kubetuner:0.1.0")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def push_to_hub(
    section: str,
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    published: dsl.Output[dsl.Artifact],
) -> None:
    """Write the model's hub folder and, when asked to, upload it.

    Args:
        section: PushSection as JSON, from plan.
        model: What train made.
        evaluation: What evaluate made.
        published: The hub folder.
    """
    from pathlib import Path

    from kubetuner.config.sections.steps import PushSection
    from kubetuner.steps.boundary import facts
    from kubetuner.steps.push_to_hub import push_to_hub

    paths = Path(model.path), Path(evaluation.path), Path(published.path)
    published.metadata.update(facts(push_to_hub(PushSection.from_json(section), *paths)))
