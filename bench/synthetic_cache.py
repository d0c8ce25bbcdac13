"""Caches of any size without a model: what the cache steps leave behind, filled with random numbers."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kubetuner.artifacts import (
    CaptionRow,
    FileEntry,
    LatentRow,
    LatentsArtifact,
    ShardEntry,
    TensorSpec,
    TextEmbedsArtifact,
    TextRow,
    list_files,
    write_artifact,
    write_rows,
)
from kubetuner.digests import fingerprint
from kubetuner.store import Store


def captions(count: int) -> Iterator[tuple[str, int]]:
    """``count`` different captions with their lengths in tokens: 8 to 71, 40 on average."""
    for index in range(count):
        yield f"a picture of the kind that people caption in about forty tokens, number {index}", 8 + index * 37 % 64


def write_latents(folder: Path, count: int, shape: Sequence[int], per_shard: int = 256) -> None:
    """``count`` bfloat16 latents of ``shape`` in shards below ``folder``."""
    store, shards = Store(folder), {}
    for start in range(0, count, per_shard):
        keys = [fingerprint("latent", index) for index in range(start, min(count, start + per_shard))]
        block = torch.randn(len(keys), *shape).bfloat16()
        shards[start] = store.write_shard("latents-bench", {key: {"latents": block[i]} for i, key in enumerate(keys)})
    rows = (
        LatentRow(
            sample=f"bench/folder/picture_{index}.png", dataset="bench", key=fingerprint("latent", index),
            shard=shards[index - index % per_shard].file, intermediary_size=(1024, 1024), crop=(0, 0),
            target_size=(1024, 1024), bucket="1.0",
        )
        for index in range(count)
    )  # fmt: skip
    write_rows(folder, "latents.jsonl", rows)
    write_artifact(
        folder,
        LatentsArtifact(
            fingerprint="latents", parents=("dataset",), files=_rows_files(folder), num_samples=count, encoded=count,
            reused=0, tensors={"latents": TensorSpec(dtype="bf16", shape=tuple(shape))},
            shards=_sorted(shards.values()),
        ),
    )  # fmt: skip


def write_texts(folder: Path, count: int, width: int, per_shard: int = 512) -> None:
    """Embeddings of ``count`` captions, bfloat16 ``[tokens, width]``, and of the empty text."""
    texts = [("", 1), *captions(count)]
    store, shards = Store(folder), {}
    for start in range(0, len(texts), per_shard):
        samples: dict[str, dict[str, Tensor]] = {
            fingerprint("text", text): {"embeds": torch.randn(tokens, width).bfloat16()}
            for text, tokens in texts[start : start + per_shard]
        }
        shards[start] = store.write_shard("text-bench", samples)
    named = (
        TextRow(text=text, key=fingerprint("text", text), shard=shards[index - index % per_shard].file)
        for index, (text, _) in enumerate(texts)
    )
    write_rows(folder, "texts.jsonl", named)
    pictures = (
        CaptionRow(sample=f"bench/folder/picture_{index}.png", texts=(text,))
        for index, (text, _) in enumerate(captions(count))
    )
    write_rows(folder, "captions.jsonl", pictures)
    write_artifact(
        folder,
        TextEmbedsArtifact(
            fingerprint="texts", parents=("dataset",), files=_rows_files(folder), num_texts=len(texts),
            encoded=len(texts), reused=0, tensors={"embeds": TensorSpec(dtype="bf16", shape=(None, width))},
            shards=_sorted(shards.values()),
        ),
    )  # fmt: skip


def _sorted(shards: Iterable[ShardEntry]) -> tuple[ShardEntry, ...]:
    return tuple(sorted(shards, key=lambda shard: shard.file))


def _rows_files(folder: Path) -> tuple[FileEntry, ...]:
    return tuple(entry for entry in list_files(folder) if entry.path.endswith(".jsonl"))
