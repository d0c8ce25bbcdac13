"""Kubeflow component: encode pictures with the VAE, once each."""

# mypy: disable-error-code="untyped-decorator"
import os

from kfp import dsl

IMAGE = os.environ.get("KUBETUNER_TRAIN_IMAGE", "ghcr.io/kubetuner/kubetuner-train:0.1.0")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def cache_vae(
    part: str,
    dataset: dsl.Input[dsl.Dataset],
    latents: dsl.Output[dsl.Dataset],
) -> None:
    """Encode pictures with the VAE, once each.

    Args:
        part: CacheVaeSection and shard number as JSON, from split.
        dataset: What download_dataset made.
        latents: The latents and where each one lies.
    """
    import json
    from pathlib import Path

    from kubetuner.config.sections.steps import CacheVaeSection
    from kubetuner.steps.boundary import facts
    from kubetuner.steps.cache_vae import cache_vae

    asked = json.loads(part)
    parsed = CacheVaeSection.from_json(asked["section"])
    made = cache_vae(
        parsed, Path(dataset.path), Path(latents.path), shard=asked["shard"], num_shards=asked["num_shards"]
    )
    latents.metadata.update(facts(made))
