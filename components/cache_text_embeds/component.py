"""Kubeflow component: encode captions and prompts, once each."""

# mypy: disable-error-code="untyped-decorator"
import os

from kfp import dsl

IMAGE = os.environ.get("KUBETUNER_TRAIN_IMAGE", "ghcr.io/kubetuner/kubetuner-train:0.1.0")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def cache_text_embeds(
    part: str,
    dataset: dsl.Input[dsl.Dataset],
    text_embeds: dsl.Output[dsl.Dataset],
) -> None:
    """Encode captions and prompts, once each.

    Args:
        part: CacheTextSection and shard number as JSON, from split.
        dataset: What download_dataset made.
        text_embeds: The embeddings and where each one lies.
    """
    import json
    from pathlib import Path

    from kubetuner.config.sections.steps import CacheTextSection
    from kubetuner.steps.boundary import facts
    from kubetuner.steps.cache_text_embeds import cache_text_embeds

    asked = json.loads(part)
    parsed = CacheTextSection.from_json(asked["section"])
    made = cache_text_embeds(
        parsed, Path(dataset.path), Path(text_embeds.path), shard=asked["shard"], num_shards=asked["num_shards"]
    )
    text_embeds.metadata.update(facts(made))
