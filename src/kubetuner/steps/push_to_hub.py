"""The ``push_to_hub`` step: the model with its card and pictures, on the hub or in a folder."""

import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kubetuner.artifacts import (
    ADAPTER_FILES,
    EvaluationArtifact,
    ModelArtifact,
    PublishedArtifact,
    ValidationImage,
    list_files,
    read_artifact,
    verify_files,
    write_artifact,
)
from kubetuner.config.sections.steps import PushSection
from kubetuner.digests import fingerprint
from kubetuner.errors import ArtifactError, PublishError

if TYPE_CHECKING:
    from kubetuner.publishing.model_card import Usage

logger = logging.getLogger(__name__)

HUB_FOLDER = "hub"
ASSETS_FOLDER = "assets"
CARD_FILE = "README.md"


def push_to_hub(section: PushSection, model: Path, evaluation: Path, out: Path) -> PublishedArtifact:
    """Write ``out/hub``, the folder as it is published, and upload it when ``push_to_hub`` is set.

    Args:
        section: Where to publish.
        model: Folder of the model artifact; the tracked model is preferred where it was tracked.
        evaluation: Folder of the evaluation artifact.
        out: Folder of the published artifact.

    Raises:
        ArtifactError: An input is missing or damaged, or the model is not of the section's family and type.
        PublishError: No token, the hub refused or kept failing, or the card would hold the token.
    """
    from kubetuner.publishing.hub import require_token, upload_folder
    from kubetuner.tracking import track

    trained, evaluated = read_artifact(model, ModelArtifact), read_artifact(evaluation, EvaluationArtifact)
    if (trained.family, trained.model_type) != (section.model.family, section.model_type):
        raise ArtifactError(
            f"{model} is a {trained.family} {trained.model_type} model; the settings are of another one"
        )
    verify_files(evaluation, evaluated)
    if section.push_to_hub:
        require_token()  # before any work
    folder = out / HUB_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with track("push_to_hub", {"hub_model_id": section.hub_model_id, "push_to_hub": str(section.push_to_hub)}) as run:
        usage = _copy_weights(model, trained, folder)
        _write_card(section, trained, evaluated, evaluation, folder, usage)
        run.log_text((folder / CARD_FILE).read_text(encoding="utf-8"), CARD_FILE)
        files = list_files(folder)
        url, commit = str(folder), ""
        if section.push_to_hub:
            upload = upload_folder(
                folder,
                files,
                section.hub_model_id or f"{trained.family}-{trained.model_type}",
                private=section.private,
                message=f"Trained for {trained.steps} steps",
            )
            url, commit = upload.url, upload.commit
    parents = (trained.fingerprint, evaluated.fingerprint)
    artifact = PublishedArtifact(
        fingerprint=fingerprint("push_to_hub", section.deciding(), *parents),
        parents=parents,
        files=tuple(entry.model_copy(update={"path": f"{HUB_FOLDER}/{entry.path}"}) for entry in files),
        url=url,
        commit=commit,
    )
    write_artifact(out, artifact)
    return artifact


def _copy_weights(model: Path, trained: ModelArtifact, folder: Path) -> "Usage":
    """Put the weights into ``folder``; returns how they are loaded."""
    from kubetuner.evaluation.tracked import locate_trained

    with tempfile.TemporaryDirectory(prefix="kubetuner-model-") as scratch:
        located = locate_trained(model, trained, Path(scratch)).folder
        if located.is_relative_to(scratch):
            logger.info(
                "publishing the tracked model %s, with the checksums of the trained one", trained.mlflow_model_uri
            )
        else:
            logger.info("publishing the model folder %s", located)
        if trained.model_type == "full":
            shutil.copytree(located, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
            return "pipeline"
        for name in ADAPTER_FILES:
            if (located / name).is_file():
                shutil.copyfile(located / name, folder / name)
    return "peft" if (folder / "adapter_config.json").is_file() else "lora"


def _write_card(
    section: PushSection,
    trained: ModelArtifact,
    evaluated: EvaluationArtifact,
    evaluation: Path,
    folder: Path,
    usage: "Usage",
) -> None:
    from huggingface_hub import get_token

    from kubetuner.families import load_family
    from kubetuner.publishing.model_card import render_card

    gallery = [_copy_pictures(index, image, evaluation, folder) for index, image in enumerate(evaluated.images)]
    facts = load_family(section.model.family).facts
    card = render_card(section, trained, evaluated, gallery, facts, usage)
    secrets = (get_token(), os.environ.get("MLFLOW_TRACKING_TOKEN"), os.environ.get("MLFLOW_TRACKING_PASSWORD"))
    if any(len(secret) >= 8 and secret in card for secret in secrets if secret):
        raise PublishError(
            "the model card would hold a token or password: take it out of model_card_note or the prompts"
        )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _copy_pictures(index: int, image: ValidationImage, evaluation: Path, folder: Path) -> ValidationImage:
    (folder / ASSETS_FOLDER).mkdir(exist_ok=True)
    stem = f"{ASSETS_FOLDER}/{index:02d}-{re.sub(r'[^a-zA-Z0-9_-]', '_', image.shortname)}"
    paths = {}
    for moment, source in (("before", image.before), ("after", image.after)):
        paths[moment] = f"{stem}-{moment}{Path(source).suffix}"
        shutil.copyfile(evaluation / source, folder / paths[moment])
    return image.model_copy(update=paths)
