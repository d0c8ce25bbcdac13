"""The trained model to evaluate: the tracked one where there is one and it is what was trained, else the folder."""

import logging
from dataclasses import dataclass
from pathlib import Path

from kubetuner.artifacts import ADAPTER_FILES, PIPELINE_FOLDER, FileEntry, ModelArtifact, verify_files
from kubetuner.digests import sha256_of
from kubetuner.errors import KubetunerError
from kubetuner.tracking import fetch_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """Where the weights are.

    Attributes:
        folder: A diffusers pipeline (full) or an adapter (lora).
        note: Said in the report when the tracked model could not be used; empty otherwise.
    """

    folder: Path
    note: str = ""


def locate_trained(model: Path, artifact: ModelArtifact, scratch: Path) -> TrainedModel:
    """Fetch the tracked model and compare its checksums with the artifact's; fall back to the artifact's folder.

    Args:
        model: The model artifact's folder.
        artifact: What is in it.
        scratch: Where a fetched model may be put.

    Raises:
        ArtifactError: The folder is needed and a file in it is missing or damaged.
    """
    note = ""
    if artifact.mlflow_model_uri:
        try:
            root = fetch_model(artifact.mlflow_model_uri, scratch)
            damaged = _differing(root, artifact)
            if not damaged:
                return TrainedModel(weights_folder(root, artifact))
            note = f"has {len(damaged)} file(s) that differ from the trained ones ({', '.join(damaged[:3])})"
        except (KubetunerError, OSError) as error:
            note = f"could not be fetched ({error})"
        note = f"The tracked model {artifact.mlflow_model_uri} {note}; the model folder was evaluated instead."
        logger.warning("%s", note)
    verify_files(model, artifact)
    return TrainedModel(weights_folder(model, artifact), note)


def weights_folder(root: Path, artifact: ModelArtifact) -> Path:
    """What diffusers loads from the folder of a model artifact, or of a tracked model."""
    nested = root / PIPELINE_FOLDER
    return nested if artifact.model_type == "full" and nested.is_dir() else root


def _differing(root: Path, artifact: ModelArtifact) -> list[str]:
    """Weight files that are missing below ``root`` or are not those of ``artifact``."""
    folder = weights_folder(root, artifact)
    names = {_name(entry, artifact): entry for entry in artifact.files}
    return [
        name
        for name, entry in names.items()
        if name and not ((folder / name).is_file() and sha256_of(folder / name) == entry.sha256)
    ]


def _name(entry: FileEntry, artifact: ModelArtifact) -> str:
    """Path relative to the weights' folder; empty for what is not weights."""
    if artifact.model_type == "full":
        prefix = f"{PIPELINE_FOLDER}/"
        return entry.path.removeprefix(prefix) if entry.path.startswith(prefix) else ""
    return entry.path if entry.path in ADAPTER_FILES else ""
