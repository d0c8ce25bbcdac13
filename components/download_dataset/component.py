"""Kubeflow component: fetch pictures and captions."""

# mypy: disable-error-code="untyped-decorator"
import os

from kfp import dsl

IMAGE = os.environ.get("KUBETUNER_BASE_IMAGE", "ghcr.io/kubetuner/kubetuner:0.1.0")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def download_dataset(section: str, dataset: dsl.Output[dsl.Dataset], pictures: dsl.Output[dsl.Dataset]) -> None:
    """Fetch and check pictures and captions.

    Args:
        section: DownloadSection as JSON, from plan.
        dataset: The pictures and samples.jsonl.
        pictures: Instead of in dataset, the pictures of which train makes latents; mostly none.
    """
    from pathlib import Path

    from kubetuner.config.sections.sources import DownloadSection
    from kubetuner.steps.boundary import facts
    from kubetuner.steps.download_dataset import download_dataset

    made = download_dataset(DownloadSection.from_json(section), Path(dataset.path), Path(pictures.path))
    dataset.metadata.update(facts(made))
