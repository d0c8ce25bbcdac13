"""Latents made while they are used: pictures are decoded ahead on threads, and encoded when their batch comes.

What a picture becomes depends on its row and on nothing else, so neither the order of use nor who encodes it changes a
bit. Datasets with ``vae_cache_ondemand`` get what ``cache_vae`` would have kept, and it goes to the store. Those with
``vae_cache_disable`` get mean and standard deviation of the VAE's distribution, of which every use draws anew.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from kubetuner.artifacts import (
    LATENTS_FILE,
    DatasetArtifact,
    LatentRow,
    LatentsArtifact,
    OnDemand,
    read_artifact,
    read_rows,
)
from kubetuner.config.sections.steps import ModelRef
from kubetuner.data.geometry import Placement
from kubetuner.data.kept_latents import KeptLatents
from kubetuner.data.latents import MOMENTS, SAMPLE
from kubetuner.data.pictures import NOT_FINITE, decoding_threads, read_pixels
from kubetuner.errors import ArtifactError
from kubetuner.families.base import Named
from kubetuner.families.encoding import Encoder, load_encoder
from kubetuner.store import require_store, resolve_store

logger = logging.getLogger(__name__)

# Decoded pictures that wait for their batch.
AHEAD_BYTES = 256 << 20


class LatentMaker:
    """Makes the latents of rows that name no shard; to be asked by one thread at a time.

    On a GPU it encodes on a stream of its own, beside what other threads compute.

    Args:
        encoder: Encodes.
        dataset: Folder of the dataset artifact, or of the pictures set aside by ``download_dataset``.
        rule: What is made of which dataset.
        kept: Where what is to be kept goes; ``None`` to keep nothing.

    Attributes:
        encoded: Pictures encoded so far.
        seconds: Spent by those who asked, waiting for pictures and encoding them.
    """

    def __init__(self, encoder: Encoder, dataset: Path, rule: OnDemand, kept: KeptLatents | None) -> None:
        self._encoder, self._dataset, self._rule, self.kept = encoder, dataset, rule, kept
        self._pool = ThreadPoolExecutor(decoding_threads(), "kubetuner-decode")
        self._decoding: dict[str, Future[Tensor]] = {}
        self._made: dict[str, Named] = {}
        self._stream = _own_stream(encoder.device)
        self.encoded, self.seconds = 0, 0.0

    def tensors(self, rows: Sequence[LatentRow], coming: Sequence[LatentRow] = ()) -> list[Named]:
        """Per row its sample (:data:`~kubetuner.data.latents.SAMPLE`) or moments, on the CPU.

        Args:
            rows: Those that are needed.
            coming: Those that are needed next, in order; they are decoded meanwhile, and take the places that are left
                in a batch of the VAE.

        Raises:
            ArtifactError: A picture is missing or damaged, or its latents are not finite; names it.
        """
        begun = time.perf_counter()
        if self.kept is not None:
            self.kept.fetch_ahead([[row.key for row in rows], [row.key for row in coming]])
        needed = {row.key: row for row in rows if not self._is_made(row)}
        later = {row.key: row for row in coming if not self._is_made(row)}
        self._decode(needed, later)
        found = {row.key: self._made[row.key] for row in rows if row.key in self._made}
        while needed:
            found |= self._encode(needed, later)
            needed = {key: row for key, row in needed.items() if key not in found}
        tensors = [found[row.key] if row.key in found else self._stored(row) for row in rows]
        expected = {row.key for row in coming}
        self._made = {key: made for key, made in (self._made | found).items() if key in expected}
        self.seconds += time.perf_counter() - begun
        return tensors

    def look(self) -> None:
        """See :meth:`~kubetuner.data.kept_latents.KeptLatents.look`."""
        if self.kept is not None:
            self.kept.look()

    def renew_claims(self) -> None:
        """See :meth:`~kubetuner.store.Store.renew_claims`."""
        if self.kept is not None:
            self.kept.renew_claims()

    def close(self) -> None:
        """End the threads, and write what waits for its shard to be full."""
        self._pool.shutdown(cancel_futures=True)
        if self.kept is not None:
            self.kept.write()

    def _keeps(self, row: LatentRow) -> bool:
        return row.dataset in self._rule.kept

    def _moments(self, row: LatentRow) -> bool:
        return self._rule.moments or not self._keeps(row)

    def _is_made(self, row: LatentRow) -> bool:
        return row.key in self._made or (self._keeps(row) and self.kept is not None and row.key in self.kept)

    def _stored(self, row: LatentRow) -> Named:
        assert self.kept is not None  # Or it would not count as made.
        return self.kept[row.key]

    def _decode(self, needed: Mapping[str, LatentRow], later: Mapping[str, LatentRow]) -> None:
        """Have the pictures of ``needed`` decoded, and of ``later`` as many as there is room for; forget others."""
        for key in self._decoding.keys() - needed.keys() - later.keys():
            self._decoding.pop(key).cancel()
        room = AHEAD_BYTES
        for key, row in {**needed, **later}.items():
            room -= 3 * row.target_size[0] * row.target_size[1]
            if room < 0 and key not in needed:
                return
            if key not in self._decoding:
                self._decoding[key] = self._pool.submit(self._pixels, row)

    def _encode(self, needed: Mapping[str, LatentRow], later: Mapping[str, LatentRow]) -> dict[str, Named]:
        """One batch of the VAE: the first of ``needed`` with others like it, then of ``later`` what is decoded."""
        first = next(iter(needed.values()))

        def alike(rows: Mapping[str, LatentRow]) -> Iterator[LatentRow]:
            kind = self._moments(first), first.target_size
            return (row for row in rows.values() if (self._moments(row), row.target_size) == kind)

        size = self._encoder.batch_size
        batch = list(islice(alike(needed), size))
        batch += islice(
            (row for row in alike(later) if row.key not in needed and self._is_decoded(row)), size - len(batch)
        )
        pixels = [self._decoding.pop(row.key).result() for row in batch]
        with torch.no_grad(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            made = self._encoder.encode([row.key for row in batch], pixels, moments=self._moments(first))
        self.encoded += len(batch)
        found: dict[str, Named] = {}
        for row, tensors in zip(batch, made, strict=True):
            if tensors is None:
                raise ArtifactError(f"{row.sample}: {NOT_FINITE}")
            found[row.key] = tensors
            if self._keeps(row) and self.kept is not None:
                self.kept.add(row.key, tensors)
        return found

    def _is_decoded(self, row: LatentRow) -> bool:
        return row.key in self._decoding and self._decoding[row.key].done()

    def _pixels(self, row: LatentRow) -> Tensor:
        placement = Placement(row.intermediary_size, row.crop, row.target_size, row.bucket)
        return read_pixels(self._dataset / row.picture, Path(row.picture).stem, row.sample, placement)


@contextmanager
def latent_maker(
    model: ModelRef, latents: Sequence[Path], dataset: Path | None, *, keep: bool
) -> Iterator[LatentMaker | None]:
    """What makes the latents that ``latents`` leave to be made; ``None`` where they leave none.

    Args:
        model: Whose VAE encodes.
        latents: Folders of the latents artifacts.
        dataset: Folder of the dataset artifact, or of the pictures set aside by ``download_dataset``.
        keep: Put into the store what is to be kept.

    Raises:
        ArtifactError: An artifact is damaged, or ``dataset`` is missing or is not what the latents were made of.
        InputError: There is no store to keep latents in.
    """
    artifacts = {folder: read_artifact(folder, LatentsArtifact) for folder in latents}
    rules = {folder: artifact.on_demand for folder, artifact in artifacts.items() if artifact.on_demand is not None}
    if not rules:
        yield None
        return
    folder, rule = next(iter(rules.items()))
    pictures = _pictures(dataset, folder, artifacts[folder])
    kept = None
    if keep and rule.kept:
        require_store(rule.kept)
        names = MOMENTS if rule.moments else SAMPLE
        kept = KeptLatents(resolve_store(folder), rule.namespace, names, _kept_keys(rules))
    encoder = load_encoder(model, rule.dtype, rule.batch_size)
    maker = LatentMaker(encoder, pictures, rule, kept)
    count = sum(artifact.left for artifact in artifacts.values())
    logger.info("The latents of %d pictures are not cached: the VAE, on %s, makes them", count, encoder.device)
    try:
        yield maker
    finally:
        maker.close()
        logger.info("Latents made when they were needed: %d pictures in %.1f s", maker.encoded, maker.seconds)


def _pictures(dataset: Path | None, folder: Path, artifact: LatentsArtifact) -> Path:
    """The folder of the pictures that the latents in ``folder`` are made of."""
    if dataset is None:
        raise ArtifactError(f"{folder} leaves latents to be made of pictures, and no dataset was given")
    found = read_artifact(dataset, DatasetArtifact).fingerprint
    if found != artifact.parents[0]:
        raise ArtifactError(f"{folder} was made of another dataset than {dataset}; run cache_vae again")
    return dataset


def _kept_keys(rules: dict[Path, OnDemand]) -> Iterator[str]:
    for folder, rule in rules.items():
        for row in read_rows(folder, LATENTS_FILE, LatentRow):
            if not row.shard and row.dataset in rule.kept:
                yield row.key


def _own_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # The VAE's weights are on their way there.
    return stream
