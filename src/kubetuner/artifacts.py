"""What steps hand to each other: folders with a typed, versioned, fingerprinted ``artifact.json``.

An artifact is a folder. Its payload is written first and ``artifact.json`` last, by rename: its presence
means the folder is complete. Readers learn shapes, dtypes and file names from it and from nowhere else, refuse a
schema version they do not know, and verify checksums. Rows that there are many of lie beside it as JSON Lines, named
and checksummed in it like every other payload file.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kubetuner import __version__
from kubetuner.digests import sha256_of
from kubetuner.errors import ArtifactError
from kubetuner.replacing import replacing

ARTIFACT_FILE = "artifact.json"
SAMPLES_FILE = "samples.jsonl"
LATENTS_FILE = "latents.jsonl"
TEXTS_FILE = "texts.jsonl"
CAPTIONS_FILE = "captions.jsonl"
LOSSES_FILE = "losses.jsonl"
PIPELINE_FOLDER = "pipeline"
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")


class Record(BaseModel):
    """A frozen value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(Record):
    """One payload file, relative to the artifact's folder."""

    path: str
    bytes: int
    sha256: str


class Skipped(Record):
    """A sample that was left out, and why."""

    name: str
    reason: str


class TensorSpec(Record):
    """What one named tensor of a sample looks like; ``None`` in ``shape`` varies from sample to sample."""

    dtype: str
    shape: tuple[int | None, ...]


class ShardEntry(Record):
    """One safetensors file of encoded samples, named by the SHA-256 of its bytes.

    Attributes:
        file: ``<sha256>.safetensors``, in the store or in the artifact's ``shards/`` folder.
        samples: Samples in the file.
        bytes: Size of the file.
        sha256: Checksum of the file.
    """

    file: str
    samples: int
    bytes: int
    sha256: str


class Sample(Record):
    """One usable picture of a dataset (a row of ``samples.jsonl``).

    Attributes:
        id: ``<dataset id>/<path relative to the dataset>``; unique in an artifact.
        dataset: The backend's ``id`` in the data file.
        file: Payload path of the picture's bytes, relative to the artifact; named by content.
        sha256: Checksum of the picture's bytes.
        width: Pixels, after the EXIF orientation was applied.
        height: Pixels, after the EXIF orientation was applied.
        captions: At least one; several are alternatives of which one is drawn at each use.
        mask: Payload path of its mask's bytes, named by their SHA-256; empty for a picture without one.
        mask_kind: How the mask is read (``conditioning_type``).
    """

    id: str
    dataset: str
    file: str
    sha256: str
    width: int
    height: int
    captions: tuple[str, ...]
    mask: str = ""
    mask_kind: Literal["mask", "segmentation"] = "mask"


class LatentRow(Record):
    """Where one sample's latents are and which geometry made them (a row of ``latents.jsonl``).

    Attributes:
        sample: :attr:`Sample.id`.
        dataset: The backend's ``id``.
        key: Content key: file bytes, geometry, encoder revision and dtype.
        shard: File name of the shard.
        intermediary_size: (width, height) in pixels the picture was resized to before the crop.
        crop: (top, left) of the crop in the resized picture, as really cut.
        target_size: (width, height) in pixels of the crop; the bucket.
        bucket: Aspect ratio of the bucket as SimpleTuner names it, such as ``"1.75"``.
        mask: Content key of its mask, cut like it; empty for a picture without one.
        mask_shard: File name of the mask's shard.
        picture: :attr:`Sample.file` where the latents are made while training and ``shard`` is empty; else empty.
    """

    sample: str
    dataset: str
    key: str
    shard: str
    intermediary_size: tuple[int, int]
    crop: tuple[int, int]
    target_size: tuple[int, int]
    bucket: str
    mask: str = ""
    mask_shard: str = ""
    picture: str = ""


class TextRow(Record):
    """Where one text's embedding is (a row of ``texts.jsonl``).

    Attributes:
        text: The caption or prompt, as written by the user.
        key: Content key: prepared text, encoder revision, length and preprocessing version.
        shard: File name of the shard.
    """

    text: str
    key: str
    shard: str


class CaptionRow(Record):
    """Which texts belong to one sample (a row of ``captions.jsonl``)."""

    sample: str
    texts: tuple[str, ...]


class Artifact(Record):
    """Fields that every artifact has.

    Attributes:
        fingerprint: SHA-256 over exactly what decides the payload's meaning; equal inputs, equal fingerprint.
        parents: Fingerprints of the artifacts it was made from.
        created_by: Version of kubetuner that wrote it.
        files: Payload files inside the folder (shards in an external store are not among them).
    """

    schema_version: Literal[1] = 1
    fingerprint: str
    parents: tuple[str, ...] = ()
    created_by: str = f"kubetuner {__version__}"
    files: tuple[FileEntry, ...] = ()


class DatasetArtifact(Artifact):
    """Pictures and captions, downloaded and checked. Rows: ``samples.jsonl`` (:class:`Sample`).

    The pictures are not among ``files``: each row names one and its checksum, however many there are.
    """

    kind: Literal["dataset"] = "dataset"
    num_samples: int
    skipped: tuple[Skipped, ...] = ()


class OnDemand(Record):
    """How training makes the latents that no shard holds, by the settings of ``cache_vae``.

    Attributes:
        namespace: Of the store, for those that are kept there.
        moments: What is kept is the VAE's distribution (``vae_cache_moments``).
        kept: Ids of the datasets whose latents are kept (``vae_cache_ondemand``); the others' are drawn anew from the
            VAE's distribution at every use (``vae_cache_disable``).
    """

    namespace: str
    dtype: Literal["bf16", "fp32"]
    batch_size: int
    moments: bool
    kept: tuple[str, ...]


class EncodedArtifact(Artifact):
    """Samples ``encoded`` by this run or ``reused`` from the store: part ``part[0]``, from 0, of ``part[1]``."""

    encoded: int
    reused: int
    tensors: dict[str, TensorSpec]
    shards: tuple[ShardEntry, ...]
    part: tuple[int, int] = (0, 1)


class LatentsArtifact(EncodedArtifact):
    """VAE latents of a dataset. Rows: ``latents.jsonl`` (:class:`LatentRow`).

    A shard holds the tensor ``"<key>.latents"`` of each sample; ``left`` ones are made in training (``on_demand``).
    """

    kind: Literal["latents"] = "latents"
    num_samples: int
    left: int = 0
    on_demand: OnDemand | None = None
    skipped: tuple[Skipped, ...] = ()


class TextEmbedsArtifact(EncodedArtifact):
    """Text embeddings of captions and prompts. Rows: ``texts.jsonl`` and ``captions.jsonl``.

    A shard holds the tensors ``"<key>.<name>"`` for each name in ``tensors``; sequences are trimmed to their
    attention mask where the family allows it, so the mask is ones over the stored length and is not stored.
    """

    kind: Literal["text_embeds"] = "text_embeds"
    num_texts: int


class ModelArtifact(Artifact):
    """A trained model: a diffusers pipeline folder (full) or ``pytorch_lora_weights.safetensors`` (lora).

    Attributes:
        family: ``pixart_sigma``, ``sdxl`` or ``sana``.
        model_type: ``full`` or ``lora``.
        base_model: Hub id or folder of the base.
        base_revision: Commit or content hash of the base.
        steps: Optimizer steps taken.
        num_processes: Processes that trained it together.
        first_loss: Mean training loss over the first tenth of the logged steps.
        last_loss: Mean training loss over the last tenth of the logged steps.
        mlflow_model_uri: ``models:/<id>`` when the model was tracked, else empty.
        mlflow_run_id: The train step's MLflow run, else empty.
    """

    kind: Literal["model"] = "model"
    family: str
    model_type: Literal["full", "lora"]
    base_model: str
    base_revision: str
    steps: int
    num_processes: int = 1
    first_loss: float
    last_loss: float
    mlflow_model_uri: str = ""
    mlflow_run_id: str = ""


class ValidationImage(Record):
    """One prompt drawn by the base model and by the trained one; paths are relative to the artifact."""

    shortname: str
    prompt: str
    seed: int
    width: int
    height: int
    before: str
    after: str
    clip_score_before: float | None = None
    clip_score_after: float | None = None


class EvaluationArtifact(Artifact):
    """Evaluation losses, validation pictures and scores. Files: ``report.html``, ``summary.md``, ``images/``."""

    kind: Literal["evaluation"] = "evaluation"
    eval_loss_before: float | None
    eval_loss_after: float | None
    metrics: dict[str, float]
    images: tuple[ValidationImage, ...]


class PublishedArtifact(Artifact):
    """Where the model went. ``url`` is a hub commit URL or a local folder."""

    kind: Literal["published"] = "published"
    url: str
    commit: str = ""


AnyArtifact = Annotated[
    DatasetArtifact | LatentsArtifact | TextEmbedsArtifact | ModelArtifact | EvaluationArtifact | PublishedArtifact,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[AnyArtifact] = TypeAdapter(AnyArtifact)

ArtifactT = TypeVar("ArtifactT", bound=Artifact)
RecordT = TypeVar("RecordT", bound=Record)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk and rename it over ``path``."""
    with replacing(str(path)) as temporary:
        write(Path(temporary))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, as :func:`write_atomically` does."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_rows(folder: Path, name: str, rows: Iterable[Record]) -> int:
    """Write ``rows`` as JSON Lines to ``folder/name``, one by one as they come; returns how many there were."""
    count = 0

    def write(path: Path) -> None:
        nonlocal count
        with path.open("w", encoding="utf-8") as stream:
            for row in rows:
                stream.write(row.model_dump_json() + "\n")
                count += 1

    write_atomically(folder / name, write)
    return count


def read_rows(folder: Path, name: str, row_type: type[RecordT]) -> Iterator[RecordT]:
    """Yield the rows of ``folder/name``."""
    with (folder / name).open(encoding="utf-8") as stream:
        for line in stream:
            yield row_type.model_validate_json(line)


def describe_file(folder: Path, name: str) -> FileEntry:
    """The entry of the payload file ``folder/name``."""
    path = folder / name
    return FileEntry(path=name, bytes=path.stat().st_size, sha256=sha256_of(path))


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Describe every finished payload file below ``folder``, sorted by path."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ARTIFACT_FILE)
    return tuple(
        describe_file(folder, path.relative_to(folder).as_posix())
        for path in sorted(paths)
        if not (path.name.startswith(".") and path.name.endswith(".tmp"))
    )


def write_artifact(folder: Path, artifact: Artifact) -> None:
    """Write ``artifact.json``; call it last, when the payload is complete."""
    write_text(folder / ARTIFACT_FILE, artifact.model_dump_json(indent=2) + "\n")


def read_artifact(folder: Path, kind: type[ArtifactT]) -> ArtifactT:
    """Read ``folder/artifact.json`` and check that it is a ``kind`` of a schema version we know.

    Raises:
        ArtifactError: It is missing, malformed, of another kind, or of another schema version.
    """
    path = folder / ARTIFACT_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {ARTIFACT_FILE}: the step that writes it did not finish; run it again")
    try:
        artifact = _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArtifactError(f"{path} was not written by this version ({__version__}): {error}") from error
    if not isinstance(artifact, kind):
        raise ArtifactError(f"{folder} is a {artifact.kind!r} artifact; expected {kind.model_fields['kind'].default!r}")
    return artifact


def verify_files(folder: Path, artifact: Artifact) -> None:
    """Check size and checksum of every payload file.

    Raises:
        ArtifactError: Names each file that is missing or damaged.
    """
    damaged = [
        entry.path
        for entry in artifact.files
        if not (folder / entry.path).is_file()
        or (folder / entry.path).stat().st_size != entry.bytes
        or sha256_of(folder / entry.path) != entry.sha256
    ]
    if damaged:
        raise ArtifactError(
            f"{folder}: {len(damaged)} missing or damaged file(s): {', '.join(damaged[:5])}; run the step again"
        )
