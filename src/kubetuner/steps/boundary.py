"""What crosses between a step and Kubeflow: facts for the artifact list, metrics, and numbers in JSON.

Nothing here imports kfp: components hand in the artifact's metadata and paths.
"""

import json
import math
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from kubetuner.artifacts import Artifact


def facts(artifact: Artifact) -> dict[str, object]:
    """The scalar fields of an artifact, for the ``metadata`` of the Kubeflow artifact that holds it."""
    return {
        name: value
        for name, value in artifact.model_dump(mode="json").items()
        if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    }


def write_metrics(metadata: MutableMapping[str, object], path: Path, values: Mapping[str, float | None]) -> None:
    """Record the finite ``values`` as Kubeflow metrics.

    Args:
        metadata: The metadata of the ``Metrics`` artifact. Kubeflow fails a run on NaN, so only finite values enter.
        path: Where the artifact's file goes. kfp.local serves a step from its cache only when this file exists.
        values: Metrics by name.
    """
    finite = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
    metadata.update(finite)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite, sort_keys=True) + "\n", encoding="utf-8")


def whole_numbers(value: Any) -> Any:
    """Undo Kubeflow's conversion of every number in a JSON parameter to a float: ``64.0`` becomes ``64``."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole_numbers(item) for item in value]
    return value
