"""The held-out samples that the evaluation loss is measured on: latents with the embedding of their first caption."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kubetuner.artifacts import (
    CAPTIONS_FILE,
    LATENTS_FILE,
    TEXTS_FILE,
    CaptionRow,
    LatentRow,
    LatentsArtifact,
    TextEmbedsArtifact,
    TextRow,
    read_artifact,
    read_rows,
)
from kubetuner.config.sections.steps import EvaluateSection
from kubetuner.data.latents import draw_latents, key_generator, latent_names
from kubetuner.data.parts import check_parts
from kubetuner.data.shards import CachedShards
from kubetuner.errors import ArtifactError
from kubetuner.families.base import Named
from kubetuner.families.on_demand import latent_maker

# Where a sample's latents are: their row and the tensors' names.
_Place = tuple[LatentRow, tuple[str, ...]]


@dataclass(frozen=True)
class HeldOutSample:
    """One held-out picture, encoded.

    Attributes:
        row: Where it comes from and its geometry.
        latents: float32 ``[C, h, w]``.
        text: Tensors of its first caption, floating ones as float32.
    """

    row: LatentRow
    latents: Tensor
    text: Named


@dataclass(frozen=True)
class HeldOut:
    """All held-out samples and the embedding of the empty text."""

    samples: tuple[HeldOutSample, ...]
    null: Named


@dataclass(frozen=True)
class _Texts:
    """Which texts a sample has and where each text's embedding is."""

    captions: dict[str, tuple[str, ...]]
    rows: dict[str, TextRow]

    def row(self, text: str) -> TextRow:
        if text not in self.rows:
            raise ArtifactError(f"no embedding of {text!r} in the text embeds; run cache_text_embeds again")
        return self.rows[text]

    def tensors(self, shards: CachedShards, text: str, names: Sequence[str]) -> Named:
        row = self.row(text)
        return _floats(shards.tensors(row.key, row.shard, names))


def read_held_out(
    section: EvaluateSection,
    latents: Sequence[Path],
    text_embeds: Sequence[Path],
    text_tensors: Sequence[str],
    dataset: Path | None = None,
) -> HeldOut | None:
    """Up to ``num_eval_images`` samples of each of ``eval_datasets``; ``None`` when there are none.

    Samples are chosen by the hash of their id: the same ones in every run, spread over the dataset. Those whose latents
    are not cached are encoded here, of the pictures in ``dataset``.

    Raises:
        ArtifactError: A part of the dataset is missing, a sample has no caption, a caption no embedding, or there is no
            usable picture to encode.
    """
    shards = CachedShards()
    places = [place for place in _latent_rows(latents, shards) if place[0].dataset in section.eval_datasets]
    chosen: list[_Place] = []
    for name in dict.fromkeys(section.eval_datasets):
        ranked = sorted((p for p in places if p[0].dataset == name), key=lambda p: _rank(p[0].sample))
        chosen.extend(ranked[: section.num_eval_images])
    if not chosen:
        return None
    texts = _read_texts(text_embeds, shards)
    for row, _ in chosen:
        if not texts.captions.get(row.sample):
            raise ArtifactError(
                f"{row.sample} has latents and no caption in the text embeds; were both made of one dataset?"
            )
    captions = [texts.captions[row.sample][0] for row, _ in chosen]
    cached = {row.shard for row, _ in chosen if row.shard}
    shards.verify(cached | {texts.row(text).shard for text in ("", *captions)})
    made = _encode(section, latents, dataset, [row for row, _ in chosen if not row.shard])
    samples = []
    for (row, names), caption in zip(chosen, captions, strict=True):
        tensors = shards.tensors(row.key, row.shard, names) if row.shard else made[row.sample]
        drawn = draw_latents(tensors, key_generator(row.key))
        samples.append(HeldOutSample(row, drawn, texts.tensors(shards, caption, text_tensors)))
    return HeldOut(tuple(samples), texts.tensors(shards, "", text_tensors))


def _encode(
    section: EvaluateSection, latents: Sequence[Path], dataset: Path | None, rows: Sequence[LatentRow]
) -> dict[str, Named]:
    """Sample → its latents or their moments, of those that no shard holds."""
    if not rows:
        return {}
    with latent_maker(section.model, latents, dataset, keep=False) as maker:
        assert maker is not None  # A row without a shard says that latents are made.
        made = maker.tensors(rows)
    return {row.sample: _floats(tensors) for row, tensors in zip(rows, made, strict=True)}


def _latent_rows(folders: Sequence[Path], shards: CachedShards) -> Iterator[_Place]:
    artifacts = [read_artifact(folder, LatentsArtifact) for folder in folders]
    check_parts(artifacts)
    for folder, artifact in zip(folders, artifacts, strict=True):
        names = latent_names(artifact)
        shards.add(folder, artifact.shards)
        for row in read_rows(folder, LATENTS_FILE, LatentRow):
            yield row, names


def _read_texts(folders: Sequence[Path], shards: CachedShards) -> _Texts:
    texts = _Texts({}, {})
    artifacts = [read_artifact(folder, TextEmbedsArtifact) for folder in folders]
    check_parts(artifacts)
    for folder, artifact in zip(folders, artifacts, strict=True):
        shards.add(folder, artifact.shards)
        for caption in read_rows(folder, CAPTIONS_FILE, CaptionRow):
            texts.captions[caption.sample] = caption.texts
        for row in read_rows(folder, TEXTS_FILE, TextRow):
            texts.rows[row.text] = row
    return texts


def _rank(sample: str) -> str:
    return hashlib.sha256(sample.encode()).hexdigest()


def _floats(tensors: Named) -> Named:
    return {name: _single(tensor) for name, tensor in tensors.items()}


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
