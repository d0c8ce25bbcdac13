"""The ``cache_text_embeds`` step: captions of a dataset artifact in, text embeddings out."""

import logging
from array import array
from collections.abc import Iterator
from pathlib import Path

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    CAPTIONS_FILE,
    SAMPLES_FILE,
    TEXTS_FILE,
    CaptionRow,
    Sample,
    TensorSpec,
    TextEmbedsArtifact,
    TextRow,
    describe_file,
    read_rows,
    write_artifact,
    write_rows,
)
from kubetuner.config.sections.steps import CacheTextSection
from kubetuner.data.caption_edits import edit_captions
from kubetuner.data.keys import Keys
from kubetuner.data.rows import RowFile
from kubetuner.data.shard_writer import ShardWriter
from kubetuner.digests import fingerprint, fingerprinting
from kubetuner.imports import importing
from kubetuner.progress import Progress
from kubetuner.steps.allocation import keep_freed_memory
from kubetuner.steps.download_dataset import read_dataset
from kubetuner.store import Store, resolve_store
from kubetuner.threads import limit_threads

logger = logging.getLogger(__name__)

# A shard is written, and so survives a kill, after this many encoded texts.
TEXTS_PER_SHARD = 512
# Captions of one sample; places of texts count on from sample to sample by it.
_MOST_TEXTS = 1 << 20


def cache_text_embeds(
    section: CacheTextSection, dataset: Path, out: Path, *, shard: int = 0, num_shards: int = 1
) -> TextEmbedsArtifact:
    """Encode the captions of the samples ``shard``, ``shard + num_shards``, … that the store does not know yet.

    The empty text is always among them: it stands for a dropped caption.

    Raises:
        ArtifactError: ``dataset`` is incomplete or damaged.
    """
    from kubetuner.tracking import track

    (out / ARTIFACT_FILE).unlink(missing_ok=True)
    with track("cache_text_embeds", {"model_family": section.model.family, "shard": f"{shard} of {num_shards}"}) as run:
        artifact = _cache(section, dataset, out, (shard, num_shards))
        run.log_metrics({"encoded": artifact.encoded, "reused": artifact.reused}, 0)
    write_artifact(out, artifact)
    return artifact


def _cache(section: CacheTextSection, dataset: Path, out: Path, part: tuple[int, int]) -> TextEmbedsArtifact:
    source = read_dataset(dataset)
    store = resolve_store(out)
    out.mkdir(parents=True, exist_ok=True)
    encoding = section.encoding()
    write_rows(out, CAPTIONS_FILE, _captions(section, dataset, part))
    texts = _Texts(out / CAPTIONS_FILE, encoding)
    namespace = f"text-{fingerprint(encoding)[:16]}"
    for entry, numbers in store.find(namespace, texts.keys.numbers):
        texts.keys.put(numbers, entry)
    encoded = _encode(section, store, namespace, texts)
    count = write_rows(out, TEXTS_FILE, _rows(texts))
    logger.info("text embeddings: %d reused, %d encoded", count - encoded, encoded)
    shards = texts.keys.shards()
    return TextEmbedsArtifact(
        fingerprint=fingerprint(section.deciding(), source.fingerprint, part),
        part=part,
        parents=(source.fingerprint,),
        files=tuple(describe_file(out, name) for name in (CAPTIONS_FILE, TEXTS_FILE)),
        num_texts=count,
        encoded=encoded,
        reused=count - encoded,
        tensors={name: TensorSpec(dtype=section.dtype, shape=shape) for name, shape in store.shapes(shards).items()},
        shards=shards,
    )


class _Texts:
    """The texts of ``captions.jsonl``, after the empty one, by place; they stay on disk.

    Attributes:
        keys: Their content keys; equal texts have equal ones.
    """

    def __init__(self, captions: Path, encoding: object) -> None:
        self._rows = RowFile(CaptionRow)
        key = fingerprinting(encoding)
        self.keys = Keys((place, key(text), -len(text)) for place, text in self._add(captions))

    def _add(self, captions: Path) -> Iterator[tuple[int, str]]:
        yield 0, ""
        for row, found in self._rows.add(captions):
            yield from enumerate(found.texts, (row + 1) * _MOST_TEXTS)

    def __getitem__(self, place: int) -> str:
        row, turn = divmod(place, _MOST_TEXTS)
        return self._rows[row - 1].texts[turn] if place else ""

    def missing(self) -> "array[int]":
        """The place of each text that is in no shard, similar lengths together, whatever the order of the captions.

        The longest come first: what takes the most memory, or more than there is, does so at once, and what is freed
        has room for all others.
        """
        return self.keys.missing(by_key=True)


def _captions(section: CacheTextSection, dataset: Path, part: tuple[int, int]) -> Iterator[CaptionRow]:
    shard, num_shards = part
    for index, sample in enumerate(read_rows(dataset, SAMPLES_FILE, Sample)):
        if index % num_shards == shard:
            yield CaptionRow(sample=sample.id, texts=_texts(section, sample))


def _rows(texts: _Texts) -> Iterator[TextRow]:
    """Every text once, in the order of the captions."""
    for place, key, shard in texts.keys.placed(once=True):
        assert shard is not None  # It was found or has been encoded.
        yield TextRow(text=texts[place], key=key, shard=shard.file)


def _texts(section: CacheTextSection, sample: Sample) -> tuple[str, ...]:
    """The sample's captions as they are encoded and trained on."""
    settings = next((one for one in section.captions if one.id == sample.dataset), None)
    return edit_captions(settings, sample.captions) if settings else sample.captions


def _encode(section: CacheTextSection, store: Store, namespace: str, texts: _Texts) -> int:
    """Encode the missing texts, similar lengths together, and note their shards; returns how many there were."""
    missing = texts.missing()
    if not len(missing):
        return 0
    with importing():
        import torch
        import transformers.modeling_utils  # noqa: F401 - of the text encoders, which are loaded soon

        from kubetuner.families import load_family
        from kubetuner.families.loading import default_device
        from kubetuner.families.text_encoding import encode_all

    keep_freed_memory()
    limit_threads()
    device = default_device()
    family = load_family(section.model.family)
    encoders = family.load_text_encoders(section.model, device, section.rounding)
    with (
        Progress("cache_text_embeds", len(missing), "texts") as progress,
        ShardWriter(store, namespace, texts.keys, TEXTS_PER_SHARD) as shards,
        torch.inference_mode(),
    ):
        for place, tensors in encode_all(family, encoders, section, missing, texts.__getitem__):
            shards.add(texts.keys[place], tensors)
            progress.advance(1)
    return shards.added
