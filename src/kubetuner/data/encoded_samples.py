"""Encoded samples of a dataset: their latents and texts, each read, or made, when it is asked for."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from kubetuner.artifacts import (
    CAPTIONS_FILE,
    LATENTS_FILE,
    TEXTS_FILE,
    CaptionRow,
    EncodedArtifact,
    LatentRow,
    LatentsArtifact,
    TextEmbedsArtifact,
    TextRow,
    read_artifact,
    verify_files,
)
from kubetuner.data.latents import Maker, latent_names
from kubetuner.data.masks import WEIGHTS
from kubetuner.data.parts import check_parts
from kubetuner.data.rows import Positions, RowFile
from kubetuner.data.shards import CachedShards
from kubetuner.errors import ArtifactError

Size = tuple[int, int]

# Encoded samples below this size in all stay in memory after their first use. That spares small datasets every read;
# the shards of large ones are memory-mapped and stay in the page cache as far as there is room.
MEMORY_BUDGET_BYTES = 256 << 20


class EncodedSamples:
    """Latents and text embeddings of all shards, by sample and by text; their rows stay on disk.

    Attributes:
        rows: The samples, by position.
        groups: Dataset → target size → positions in ``rows``, in the order of the samples' ids.

    Raises:
        ArtifactError: They are damaged, made of different datasets, or not all parts of one.
    """

    def __init__(
        self,
        latents: Sequence[Path],
        text_embeds: Sequence[Path],
        text_tensors: Sequence[str],
        maker: Maker | None = None,
    ) -> None:
        self._names, self._maker = tuple(text_tensors), maker
        self._shards = CachedShards()
        self._latent_names: dict[str, tuple[str, ...]] = {}
        self._kept: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._kept_bytes = 0
        self._artifacts: list[EncodedArtifact] = []
        self.rows = RowFile(LatentRow)
        self.groups: dict[str, dict[Size, list[int]]] = defaultdict(lambda: defaultdict(list))
        self._captions = RowFile(CaptionRow)
        self._texts = RowFile(TextRow)
        parents: dict[str, Path] = {}
        samples, skipped, waiting = self._read_latents(latents, parents)
        captioned: list[str] = []
        for folder in text_embeds:
            embeds = read_artifact(folder, TextEmbedsArtifact)
            self._open(folder, embeds)
            parents.setdefault(embeds.parents[0], folder)
            captioned += [row.sample for _, row in self._captions.add(folder / CAPTIONS_FILE)]
        files = (folder / TEXTS_FILE for folder in text_embeds)
        self._text_places = Positions(row.text for file in files for _, row in self._texts.add(file))
        self._caption_places = Positions(captioned)
        if len(parents) > 1:
            folders = " and ".join(str(folder) for folder in parents.values())
            raise ArtifactError(f"{folders} were made of different datasets; run cache_vae and cache_text_embeds again")
        check_parts(self._artifacts)
        _check_pairs(samples, set(captioned), skipped)
        self._shards.verify()
        if maker is None and waiting:
            raise ArtifactError(f"{waiting[0]} leaves latents to be made, and nothing was given to make them")

    def _read_latents(
        self, folders: Sequence[Path], parents: dict[str, Path]
    ) -> tuple[list[str], set[str], list[Path]]:
        """Open the latents; returns the samples' ids by position, those skipped, and folders with some left to make."""
        samples: list[str] = []
        skipped: set[str] = set()
        waiting: list[Path] = []
        for folder in folders:
            artifact = read_artifact(folder, LatentsArtifact)
            self._open(folder, artifact)
            self._latent_names.update((shard.file, latent_names(artifact)) for shard in artifact.shards)
            parents.setdefault(artifact.parents[0], folder)
            for position, row in self.rows.add(folder / LATENTS_FILE):
                samples.append(row.sample)
                self.groups[row.dataset][row.target_size].append(position)
            skipped |= {skip.name for skip in artifact.skipped}
            waiting += [folder] if artifact.left else []
        for sizes in self.groups.values():
            for positions in sizes.values():
                positions.sort(key=samples.__getitem__)
        return samples, skipped, waiting

    def captions(self, sample: str) -> tuple[str, ...]:
        """The captions of a sample."""
        found = (self._captions[position] for position in self._caption_places.of(sample))
        return next(row.texts for row in found if row.sample == sample)

    def latents(self, rows: Sequence[LatentRow], following: Sequence[int]) -> list[dict[str, Tensor]]:
        """Per sample its latents or their moments, float32 ``[C, h, w]``.

        ``following`` are positions in ``rows`` that are asked for next; where their latents are still to be made, that
        is prepared.
        """
        known = [self._known(row) for row in rows]
        if self._maker is None:
            return [tensors for tensors in known if tensors is not None]
        unmade = [row for row, tensors in zip(rows, known, strict=True) if tensors is None]
        coming = [row for position in following if self._is_unmade(row := self.rows[position])]
        made = zip(unmade, self._maker.tensors(unmade, coming), strict=True)
        kept = (self._keep(row.key, "", tensors) for row, tensors in made)
        return [next(kept) if tensors is None else tensors for tensors in known]

    def _known(self, row: LatentRow) -> dict[str, Tensor] | None:
        """The latents of a sample if they are in a shard or in memory."""
        if row.shard:
            return self._read(row.key, row.shard, self._latent_names[row.shard])
        return self._kept.get((row.key, ""))

    def _is_unmade(self, row: LatentRow) -> bool:
        return not row.shard and (row.key, "") not in self._kept

    def look(self) -> None:
        """Find what other processes have encoded."""
        if self._maker is not None:
            self._maker.look()

    def mask(self, row: LatentRow) -> Tensor:
        """The mask of a sample that has one, float32 ``[1, h, w]``."""
        return self._read(row.mask, row.mask_shard, (WEIGHTS,))[WEIGHTS]

    def text(self, text: str) -> dict[str, Tensor]:
        """The embedding of a caption by tensor name; floating tensors are float32."""
        row = self._row(text)
        return self._read(row.key, row.shard, self._names)

    def _row(self, text: str) -> TextRow:
        found = (self._texts[position] for position in self._text_places.of(text))
        row = next((row for row in found if row.text == text), None)
        if row is None:
            raise ArtifactError(f"no embedding of {text!r}; run cache_text_embeds again")
        return row

    def renew_claims(self) -> None:
        """See :meth:`CachedShards.renew_claims`."""
        self._shards.renew_claims()
        if self._maker is not None:
            self._maker.renew_claims()

    @property
    def wants_order(self) -> bool:
        """Whether reading is faster after :meth:`fetch_ahead`."""
        return self._shards.wants_order

    def fetch_ahead(self, batches: Sequence[Sequence[tuple[int, str]]]) -> None:
        """Say which samples, each a position in ``rows`` and a caption, the next batches read."""
        self._shards.fetch_ahead(
            [{file for row, text in batch for file in self._shards_of(self.rows[row], text)} for batch in batches]
        )

    def _shards_of(self, row: LatentRow, text: str) -> Iterator[str]:
        yield self._row(text).shard
        if row.shard:
            yield row.shard
        if row.mask:
            yield row.mask_shard

    def _open(self, folder: Path, artifact: EncodedArtifact) -> None:
        verify_files(folder, artifact)
        self._artifacts.append(artifact)
        self._shards.add(folder, artifact.shards)

    def _read(self, key: str, shard: str, names: tuple[str, ...]) -> dict[str, Tensor]:
        kept = self._kept.get((key, shard))
        return self._keep(key, shard, self._shards.tensors(key, shard, names)) if kept is None else kept

    def _keep(self, key: str, shard: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``found`` as it is used, kept in memory while there is room."""
        tensors = {name: _float(tensor) for name, tensor in found.items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._kept_bytes + size <= MEMORY_BUDGET_BYTES and (key, shard) not in self._kept:
            self._kept[key, shard] = tensors
            self._kept_bytes += size
        return tensors


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _check_pairs(samples: Sequence[str], captioned: set[str], skipped: set[str]) -> None:
    """Refuse samples that have latents and no caption, or a caption and no latents."""
    without = [sample for sample in samples if sample not in captioned]
    if without:
        raise ArtifactError(f"{len(without)} samples such as {without[0]} have no caption; run cache_text_embeds again")
    without = sorted(captioned - set(samples) - skipped)
    if without:
        raise ArtifactError(
            f"{len(without)} samples such as {without[0]} have captions and no latents; give the latents of all "
            "shards, or run cache_vae again"
        )
