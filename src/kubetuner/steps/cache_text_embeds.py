"""The ``cache_text_embeds`` step: captions of a dataset artifact in, text embeddings out."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    CAPTIONS_FILE,
    SAMPLES_FILE,
    TEXTS_FILE,
    CaptionRow,
    Sample,
    ShardEntry,
    TensorSpec,
    TextEmbedsArtifact,
    TextRow,
    describe_file,
    fingerprint,
    read_rows,
    write_artifact,
    write_rows,
)
from kubetuner.config.sections import CacheTextSection
from kubetuner.data.caption_edits import edit_captions
from kubetuner.progress import Progress
from kubetuner.steps.download_dataset import read_dataset
from kubetuner.store import Store, resolve_store

logger = logging.getLogger(__name__)

# Texts handed to the family at once, in batches: enough that most of its batches of one length are full.
BATCHES_AT_ONCE = 8
# A shard is written, and so survives a kill, after this many encoded texts.
TEXTS_PER_SHARD = 512


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
    shard, num_shards = part
    store = resolve_store(out)
    out.mkdir(parents=True, exist_ok=True)
    encoding = section.encoding()
    keys = {"": fingerprint("", encoding)}

    def captions() -> Iterator[CaptionRow]:
        for index, sample in enumerate(read_rows(dataset, SAMPLES_FILE, Sample)):
            if index % num_shards == shard:
                texts = _texts(section, sample)
                keys.update((text, fingerprint(text, encoding)) for text in texts if text not in keys)
                yield CaptionRow(sample=sample.id, texts=texts)

    write_rows(out, CAPTIONS_FILE, captions())
    namespace = f"text-{fingerprint(encoding)[:16]}"
    known = store.known(namespace, frozenset(keys.values()))
    missing = [text for text, key in keys.items() if key not in known]
    known |= _encode(section, store, namespace, {text: keys[text] for text in missing})
    logger.info("text embeddings: %d reused, %d encoded", len(keys) - len(missing), len(missing))
    write_rows(out, TEXTS_FILE, (TextRow(text=text, key=key, shard=known[key].file) for text, key in keys.items()))
    shards = {entry.file: entry for entry in known.values()}
    shapes = store.shapes(shards.values())
    return TextEmbedsArtifact(
        fingerprint=fingerprint(section.deciding(), source.fingerprint, part),
        parents=(source.fingerprint,),
        files=tuple(describe_file(out, name) for name in (CAPTIONS_FILE, TEXTS_FILE)),
        num_texts=len(keys),
        encoded=len(missing),
        reused=len(keys) - len(missing),
        tensors={name: TensorSpec(dtype=section.dtype, shape=shape) for name, shape in shapes.items()},
        shards=tuple(shards[file] for file in sorted(shards)),
    )


def _texts(section: CacheTextSection, sample: Sample) -> tuple[str, ...]:
    """The sample's captions as they are encoded and trained on."""
    settings = next((one for one in section.captions if one.id == sample.dataset), None)
    return edit_captions(settings, sample.captions) if settings else sample.captions


def _encode(
    section: CacheTextSection, store: Store, namespace: str, missing: Mapping[str, str]
) -> dict[str, ShardEntry]:
    """Encode the texts of ``missing`` (text → key), similar lengths together; returns key → the shard written."""
    if not missing:
        return {}
    import torch

    from kubetuner.families import load_family
    from kubetuner.families.loading import default_device

    device = default_device()
    family = load_family(section.model.family)
    encoders = family.load_text_encoders(section.model, device)
    dtype = torch.bfloat16 if section.dtype == "bf16" else torch.float32
    texts = sorted(missing, key=lambda text: (len(text), text))
    at_once = BATCHES_AT_ONCE * section.text_encoder_batch_size
    written: dict[str, ShardEntry] = {}
    with Progress("cache_text_embeds", len(texts), "texts") as progress, torch.inference_mode():
        for start in range(0, len(texts), TEXTS_PER_SHARD):
            ready = {}
            for first in range(start, min(start + TEXTS_PER_SHARD, len(texts)), at_once):
                last = min(first + at_once, start + TEXTS_PER_SHARD)
                batch = texts[first:last]
                for text, tensors in zip(batch, family.encode_texts(encoders, batch, section), strict=True):
                    ready[missing[text]] = {name: tensor.to(dtype).clone() for name, tensor in tensors.items()}
                progress.advance(len(batch))
            written |= dict.fromkeys(ready, store.write_shard(namespace, ready))
    return written
