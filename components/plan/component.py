"""Kubeflow component: check the configuration and work out one section per step."""

# mypy: disable-error-code="untyped-decorator, type-arg"
import os
from typing import NamedTuple

from kfp import dsl

IMAGE = os.environ.get("KUBETUNER_BASE_IMAGE", "ghcr.io/kubetuner/kubetuner:0.1.0")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan(config: dict, data_backend_config: list, report: dsl.Output[dsl.Markdown]) -> NamedTuple(  # type: ignore[valid-type]
    "Plan",
    [
        ("download", str),
        ("cache_vae", str),
        ("cache_text_embeds", str),
        ("train", str),
        ("evaluate", str),
        ("push", str),
    ],
):
    """Check the configuration and work out one section per step.

    Args:
        config: Contents of config.json.
        data_backend_config: Contents of multidatabackend.json.
        report: The plan, for people.
    """
    from pathlib import Path

    from kubetuner.steps.boundary import whole_numbers
    from kubetuner.steps.plan import make_plan

    made = make_plan(whole_numbers(config), whole_numbers(data_backend_config), cwd=Path.cwd(), predict_memory=True)
    Path(report.path).write_text(made.markdown, encoding="utf-8")
    s = made.sections
    return tuple(p.to_json() for p in (s.download, s.cache_vae, s.cache_text_embeds, s.train, s.evaluate, s.push))
