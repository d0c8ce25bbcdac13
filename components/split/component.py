"""Kubeflow component: the shard numbers that the cache steps fan out over."""

# mypy: disable-error-code="untyped-decorator, type-arg"
import os

from kfp import dsl

IMAGE = os.environ.get("KUBETUNER_BASE_IMAGE", "ghcr.io/kubetuner/kubetuner:0.1.0")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def split(section: str, num_shards: int) -> list:
    """List the parts to fan out over, each a section with its shard number, as JSON.

    The section travels in the loop's items: kfp.local replaces any other task's output inside a loop by the item.

    Args:
        section: The cache step's section as JSON, from plan.
        num_shards: How many pods share the work of each cache step.
    """
    import json

    count = max(1, num_shards)
    parts = [{"num_shards": count, "section": section, "shard": shard} for shard in range(count)]
    return [json.dumps(part, sort_keys=True) for part in parts]
