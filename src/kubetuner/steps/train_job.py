"""The ``train`` step on several machines: everything before and after the TrainJob, in the pod that waits for it.

::

    <mount>/kubetuner/<TrainJob>/inputs/    the latents and text embeds artifacts, copied from this pod, and pictures
                                            whose latents the nodes make
                                 words/     the task, and what goes wrong in any process
                                 model/     the nodes' output, with checkpoints until it is complete

The TrainJob is named by the run's fingerprint: who starts the same run again finds it, its checkpoints or its model.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    LatentsArtifact,
    ModelArtifact,
    read_artifact,
    verify_files,
    write_artifact,
    write_text,
)
from kubetuner.config.sections.steps import TrainSection
from kubetuner.config.trainjob import GUIDE, TrainJobSettings
from kubetuner.digests import fingerprint, sha256_of
from kubetuner.errors import ArtifactError, InputError, TrainingError
from kubetuner.steps.train import Inputs, WorkerRequest
from kubetuner.store import require_store
from kubetuner.training.distributed.launch import ARGUMENT_FILE
from kubetuner.training.interruption import StopRequest
from kubetuner.trainjob.cluster import Cluster
from kubetuner.trainjob.follow import follow, submit
from kubetuner.trainjob.manifest import left_behind, make_trainjob

logger = logging.getLogger(__name__)


def train_in_job(
    section: TrainSection,
    latents: Sequence[Path],
    text_embeds: Sequence[Path],
    out: Path,
    settings: TrainJobSettings,
    *,
    dataset: Path | None = None,
) -> ModelArtifact:
    """Train on ``num_machines`` nodes of a TrainJob and bring the model to ``out``.

    Args:
        section: What to train and how.
        latents: Folders of the latents artifacts.
        text_embeds: Folders of the text embeds artifacts.
        out: Folder of the model artifact.
        settings: What the nodes need to know of the cluster.
        dataset: Folder of the dataset artifact, or of the pictures set aside.

    Raises:
        InputError: The volume, the environment or the cluster's rights are not as they must be.
        ArtifactError: An input or the model is missing or damaged.
        TrainingError: The TrainJob failed, or cannot start.
        TerminatedError: SIGTERM arrived; run again to resume.
    """
    parents = Inputs(tuple(latents), tuple(text_embeds)).fingerprints()
    _check(settings, section.num_train_processes)
    name = f"kubetuner-{fingerprint('trainjob', section.deciding_with(0), *parents)[:16]}"
    shared = Path(settings.mount) / "kubetuner" / name
    model, words = shared / "model", shared / "words"
    with StopRequest() as stop:
        cluster = Cluster.of_this_pod(settings.namespace, stop)
        if not (model / ARTIFACT_FILE).is_file():
            cluster.check_rights()
            request = WorkerRequest(
                section=section,
                latents=_share(latents, shared / "inputs" / "latents"),
                text_embeds=_share(text_embeds, shared / "inputs" / "text_embeds"),
                out=model,
                dataset=_share_pictures(latents, dataset, shared / "inputs" / "pictures"),
            )
            digest = fingerprint(request, settings)
            job = make_trainjob(name, digest, words, section.num_machines, section.num_train_processes, settings)
            for missing in left_behind(settings, os.environ):
                logger.warning("%s is set here and not for the nodes; name its Secret in KUBETUNER_TRAINJOB.", missing)
            write_text(words / ARGUMENT_FILE, request.model_dump_json())
            submit(cluster, job, words, stop)
            follow(cluster, job, words, settings.start_minutes, stop)
        artifact = _fetch(model, out)
        cluster.delete(name)
    shutil.rmtree(shared, ignore_errors=True)
    return artifact


def _check(settings: TrainJobSettings, processes: int) -> None:
    """What would make every node fail; ``processes`` is what each is to start, 0 for one per GPU.

    Raises:
        InputError: Names it all.
    """
    problems = settings.unseen()
    if not os.path.isdir(settings.mount):
        problems.append(
            f"{settings.mount} is no folder; the claim {settings.workspace_pvc!r} must be mounted there in this pod "
            "too, which kubetuner compile does where KUBETUNER_TRAINJOB is set"
        )
    elif not os.access(settings.mount, os.W_OK):
        problems.append(f"{settings.mount} cannot be written to by user {os.getuid()}; see fsGroup of the volume")
    if settings.gpus and processes > settings.gpus:
        problems.append(f"num_train_processes is {processes} and each node has {settings.gpus} GPU(s)")
    if not settings.image:
        problems.append("image is empty; kubetuner compile fills it in, or name the train image")
    if problems:
        raise InputError(f"several machines cannot train ({GUIDE}): {'; '.join(problems)}.")


def _share(folders: Sequence[Path], root: Path) -> tuple[Path, ...]:
    """Copies of artifacts where all nodes can read them, named by content: nodes may be reading earlier ones."""
    return tuple(_copy(folder, root / sha256_of(folder / ARTIFACT_FILE)[:16]) for folder in folders)


def _share_pictures(latents: Sequence[Path], dataset: Path | None, root: Path) -> Path | None:
    """A copy of ``dataset`` where ``latents`` leave some to be made; otherwise nobody reads it.

    Raises:
        InputError: What the nodes encode is to be kept, and there is no store.
    """
    artifacts = [read_artifact(folder, LatentsArtifact) for folder in latents]
    rules = [artifact.on_demand for artifact in artifacts if artifact.on_demand is not None]
    for rule in rules:
        require_store(rule.kept)
    return _share([dataset], root)[0] if rules and dataset is not None else None


def _copy(source: Path, target: Path) -> Path:
    """``source`` at ``target``, which appears when it is whole."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".copy.") as name:
            shutil.copytree(source, Path(name) / "whole").rename(target)
    except (OSError, shutil.Error) as error:
        raise TrainingError(f"{source} cannot be copied to the shared volume ({target}): {error}") from error
    return target


def _fetch(model: Path, out: Path) -> ModelArtifact:
    """The model artifact, copied to ``out``: its files first, ``artifact.json`` last."""
    artifact = read_artifact(model, ModelArtifact)
    try:
        verify_files(model, artifact)
    except ArtifactError:
        (model / ARTIFACT_FILE).unlink()  # The next attempt makes it anew.
        raise
    out.mkdir(parents=True, exist_ok=True)
    for entry in artifact.files:
        (out / entry.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model / entry.path, out / entry.path)
    verify_files(out, artifact)
    write_artifact(out, artifact)
    return artifact
