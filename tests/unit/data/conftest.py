"""Encoded datasets without a model: what caches leave behind, of numbers that tell the samples apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kubetuner.artifacts import (
    CaptionRow,
    FileEntry,
    LatentRow,
    LatentsArtifact,
    Skipped,
    TextEmbedsArtifact,
    TextRow,
    write_artifact,
    write_rows,
)
from kubetuner.digests import sha256_of
from kubetuner.store import Store

Size = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A sample: its id, target size, captions and the number that fills its latents."""

    sample: str
    size: Size
    number: float
    captions: tuple[str, ...] = ("a caption",)

    @property
    def dataset(self) -> str:
        return self.sample.partition("/")[0]


def encoded(counts: Mapping[str, Mapping[Size, int]], captions: tuple[str, ...] = ("a caption",)) -> list[Encoded]:
    """``counts`` samples by dataset and target size, with different numbers."""
    names = [
        (f"{dataset}/{width}x{height}-{index}.png", (width, height))
        for dataset, sizes in counts.items()
        for (width, height), count in sizes.items()
        for index in range(count)
    ]
    return [Encoded(name, size, float(number), captions) for number, (name, size) in enumerate(names)]


def write_latents(
    folder: Path,
    samples: Sequence[Encoded],
    parent: str = "dataset",
    skipped: Sequence[str] = (),
    part: tuple[int, int] = (0, 1),
) -> Path:
    """A latents artifact; latents are float32 ``[2, height / 8, width / 8]``."""
    store = Store(folder)
    shards = []
    rows = []
    if samples:
        tensors = {
            _key(sample): {"latents": torch.full((2, sample.size[1] // 8, sample.size[0] // 8), sample.number)}
            for sample in samples
        }
        shards.append(store.write_shard("latents", tensors))
        rows = [
            LatentRow(
                sample=sample.sample, dataset=sample.dataset, key=_key(sample), shard=shards[0].file,
                intermediary_size=sample.size, crop=(0, 0), target_size=sample.size,
                bucket=str(round(sample.size[0] / sample.size[1], 2)),
            )
            for sample in samples
        ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, "latents.jsonl", rows)
    artifact = LatentsArtifact(
        fingerprint="latents", parents=(parent,), files=(_entry(folder / "latents.jsonl"),), num_samples=len(rows),
        encoded=len(rows), reused=0, tensors={}, shards=tuple(shards), part=part,
        skipped=tuple(Skipped(name=name, reason="too small") for name in skipped),
    )  # fmt: skip
    write_artifact(folder, artifact)
    return folder


def write_texts(
    folder: Path,
    samples: Sequence[Encoded],
    parent: str = "dataset",
    dtype: torch.dtype = torch.float32,
    part: tuple[int, int] = (0, 1),
) -> Path:
    """A text embeds artifact; ``embeds`` of a text is ``[1, 1]``, its place among the sorted texts."""
    texts = sorted({"", *(text for sample in samples for text in sample.captions)})
    tensors = {
        f"t{place:03}": {"embeds": torch.full((1, 1), float(place), dtype=dtype), "ids": torch.tensor([place])}
        for place in range(len(texts))
    }
    shard = Store(folder).write_shard("texts", tensors)
    write_rows(
        folder,
        "texts.jsonl",
        [TextRow(text=text, key=f"t{place:03}", shard=shard.file) for place, text in enumerate(texts)],
    )
    write_rows(folder, "captions.jsonl", [CaptionRow(sample=one.sample, texts=one.captions) for one in samples])
    artifact = TextEmbedsArtifact(
        fingerprint="texts", parents=(parent,),
        files=(_entry(folder / "texts.jsonl"), _entry(folder / "captions.jsonl")),
        num_texts=len(texts), encoded=len(texts), reused=0, tensors={}, shards=(shard,), part=part,
    )  # fmt: skip
    write_artifact(folder, artifact)
    return folder


def _key(sample: Encoded) -> str:
    return f"{int(sample.number):04}"


def _entry(path: Path) -> FileEntry:
    return FileEntry(path=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
