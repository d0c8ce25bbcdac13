"""``download_dataset``: copy pictures and captions into an artifact, checking every picture.

Pictures are named by their content, so that equal pictures are kept once and a second run copies only what is new.
The fingerprint covers ids, bytes and captions; it does not depend on where the pictures came from or when.
"""

import hashlib
import logging
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    SAMPLES_FILE,
    DatasetArtifact,
    Sample,
    Skipped,
    describe_file,
    read_artifact,
    read_rows,
    verify_files,
    write_artifact,
    write_rows,
)
from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.data.captions import CaptionError, captions_for
from kubetuner.data.composites import cut_tile
from kubetuner.data.pictures import PictureError, check_picture
from kubetuner.digests import canonical_json, sha256_of
from kubetuner.errors import DatasetError, on_one_line
from kubetuner.progress import Progress
from kubetuner.replacing import write_bytes
from kubetuner.sources.base import PICTURE_EXTENSIONS, Item, ItemError, Listing, Source, as_planned, name_fault
from kubetuner.sources.filters import describe, nothing_left
from kubetuner.sources.items import Items, ItemsByName
from kubetuner.sources.subset import subset
from kubetuner.sources.switch import open_source
from kubetuner.steps.download_masks import MaskOrigin, open_masks, take_mask
from kubetuner.threads import in_threads

logger = logging.getLogger(__name__)

FILES_FOLDER = "files"
SHOWN_SKIPS = 5


@dataclass(frozen=True)
class _Origin:
    """An opened dataset, the pictures to take in from it, in the order of reading, and their masks, if it has any."""

    settings: DatasetSource
    source: Source
    listing: Listing
    items: Items
    masks: MaskOrigin | None


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture to take in."""

    origin: _Origin
    item: Item

    @property
    def dataset(self) -> str:
        return self.origin.settings.id

    @property
    def id(self) -> str:
        return f"{self.dataset}/{os.fsencode(self.item.name).decode('utf-8', 'backslashreplace')}"


def download_dataset(section: DownloadSection, out: Path, pictures: Path | None = None) -> DatasetArtifact:
    """Write the pictures and captions of ``section.datasets`` to ``out`` as a dataset artifact.

    Args:
        section: What to fetch.
        out: Folder of the artifact.
        pictures: Another folder for the pictures that training reads, ``section.on_demand``, under the same names and
            with the same ``artifact.json``: so that no other step has to fetch what only one needs. Default: ``out``.

    Raises:
        DatasetError: A source cannot be read or is empty, or more than ``max_skipped_share`` of a dataset's pictures
            cannot be used.
    """
    from kubetuner.tracking import track

    folders = _Folders(out, pictures or out, frozenset(section.on_demand))
    for folder in folders.all:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ARTIFACT_FILE).unlink(missing_ok=True)
    with track("download_dataset", {"datasets": ", ".join(source.id for source in section.datasets)}) as run:
        artifact = _download(section, folders)
        _remove_others(folders)
        run.log_metrics({"samples": artifact.num_samples, "skipped": len(artifact.skipped)}, 0)
    if pictures is not None:
        write_artifact(pictures, artifact.model_copy(update={"files": ()}))
    write_artifact(out, artifact)
    logger.info("download_dataset: %d samples, %d skipped", artifact.num_samples, len(artifact.skipped))
    return artifact


def read_dataset(folder: Path) -> DatasetArtifact:
    """The dataset artifact in ``folder``, its rows checked; each picture is checked when it is read.

    Raises:
        ArtifactError: It is incomplete or damaged.
    """
    source = read_artifact(folder, DatasetArtifact)
    rows = tuple(entry for entry in source.files if entry.path == SAMPLES_FILE)
    verify_files(folder, source.model_copy(update={"files": rows}))
    return source


@dataclass(frozen=True)
class _Folders:
    """Where files go: rows, masks and most pictures to ``out``, those of the datasets ``on_demand`` to ``pictures``."""

    out: Path
    pictures: Path
    on_demand: frozenset[str]

    @property
    def all(self) -> tuple[Path, Path]:
        return self.out, self.pictures

    def of(self, dataset: str) -> Path:
        """The folder of a dataset's pictures."""
        return self.pictures if dataset in self.on_demand else self.out


def _download(section: DownloadSection, folders: _Folders) -> DatasetArtifact:
    out = folders.out
    skipped: list[tuple[str, Skipped]] = []
    with ExitStack() as stack:
        origins = _list(section, stack)
        taken = _Taken(stack.enter_context(tempfile.TemporaryFile(dir=out)))
        progress = Progress("download_dataset", sum(len(origin.items) for origin in origins), "pictures")
        stack.enter_context(progress)
        for picture, result in zip(_pictures(origins), _take_all(origins, folders), strict=True):
            if isinstance(result, Skipped):
                logger.warning("skipped %s: %s", on_one_line(result.name), result.reason)
                skipped.append((picture.dataset, result))
                taken.add(None)
            else:
                taken.add(result)
            progress.advance(note=f"{len(skipped)} skipped" if skipped else "")
        _judge(section, origins, skipped)
        count = write_rows(out, SAMPLES_FILE, _in_order(origins, taken))
    return DatasetArtifact(
        fingerprint=_fingerprint(read_rows(out, SAMPLES_FILE, Sample)),
        files=(describe_file(out, SAMPLES_FILE),),
        num_samples=count,
        skipped=tuple(skip for _, skip in skipped),
    )


def _remove_others(folders: _Folders) -> None:
    """Remove the files that an earlier run left here and that are no longer in the dataset."""
    for folder in dict.fromkeys(folders.all):
        kept = ItemsByName(Items(Item(file) for file in _files_in(folder, folders)))
        for path in (folder / FILES_FOLDER).glob("*/*"):  # Not rglob, which remembers every path it gave.
            if path.is_file() and path.relative_to(folder).as_posix() not in kept:
                path.unlink()


def _files_in(folder: Path, folders: _Folders) -> Iterator[str]:
    """The pictures and masks of the dataset that belong in ``folder``."""
    for sample in read_rows(folders.out, SAMPLES_FILE, Sample):
        if folders.of(sample.dataset) == folder:
            yield sample.file
        if sample.mask and folders.out == folder:
            yield sample.mask


class _Taken:
    """What became of the pictures, in the order of reading: rows in ``file``, 8 bytes each in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._ends = array("Q", [0])

    def add(self, sample: Sample | None) -> None:
        """Append a sample, or ``None`` for a picture that was skipped."""
        length = self._file.write(sample.model_dump_json().encode()) if sample else 0
        self._ends.append(self._ends[-1] + length)

    def __getitem__(self, index: int) -> Sample | None:
        start, end = self._ends[index], self._ends[index + 1]
        self._file.seek(start)
        return Sample.model_validate_json(self._file.read(end - start)) if end > start else None


def _fingerprint(samples: Iterable[Sample]) -> str:
    """``fingerprint("dataset", [[id, sha256, captions, mask if any], …])``, one sample at a time."""
    digest = hashlib.sha256(b'["dataset",[')
    for index, sample in enumerate(samples):
        mask = [sample.mask, sample.mask_kind] if sample.mask else []
        text = canonical_json([sample.id, sample.sha256, sample.captions, *mask])
        digest.update(f",{text}".encode() if index else text.encode())
    digest.update(b"]]")
    return digest.hexdigest()


def _list(section: DownloadSection, stack: ExitStack) -> list[_Origin]:
    """Every dataset's pictures; what is wrong with any dataset is told at once. ``stack`` closes the sources."""
    origins: list[_Origin] = []
    problems: list[str] = []
    masks = {dataset: one for one in section.masks for dataset in one.of}
    for settings in section.datasets:
        try:
            source = stack.enter_context(closing(open_source(settings)))
            listing = as_planned(source.listing(), settings.revision, settings.newest)
            items = subset(listing.pictures, settings.id, settings.max_num_samples)
            theirs = open_masks(masks[settings.id], items, stack) if settings.id in masks else None
        except DatasetError as error:
            problems.append(f"dataset {settings.id!r}: {error}")
            continue
        if listing.filtered:
            logger.info("%s: filter_func leaves out %s", settings.id, describe(listing.filtered))
        if nothing := nothing_left(listing, source.place):
            problems.append(f"dataset {settings.id!r}: filter_func {nothing}")
        elif not listing.pictures:
            known = " ".join(sorted(PICTURE_EXTENSIONS))
            problems.append(f"dataset {settings.id!r}: no picture in {source.place} (looked for {known})")
        origins.append(_Origin(settings, source, listing, items, theirs))
    if problems:
        raise DatasetError("; ".join(problems))
    return origins


def _pictures(origins: Sequence[_Origin]) -> Iterator[_Picture]:
    """Every picture, in the order of reading."""
    return (_Picture(origin, item) for origin in origins for item in origin.items)


def _in_order(origins: Sequence[_Origin], taken: _Taken) -> Iterator[Sample]:
    """Samples by dataset, as the data file has them, and name; the order of reading differs from source to source."""
    before = 0
    for items in (origin.items for origin in origins):
        for index in items.order():
            if sample := taken[before + index]:
                yield sample
        before += len(items)


def _take_all(origins: Sequence[_Origin], folders: _Folders) -> Iterator[Sample | Skipped]:
    """Take in every picture on several threads, in order."""
    readers = max(origin.source.readers for origin in origins)
    return in_threads(lambda picture: _take(picture, folders), _pictures(origins), readers, "download")


def _take(picture: _Picture, folders: _Folders) -> Sample | Skipped:
    """Check one picture, and its mask, and copy their bytes; the bytes hashed are the ones that were decoded."""
    if fault := name_fault(picture.item.name):
        return Skipped(name=picture.id, reason=fault)
    try:
        origin = picture.origin
        captions = captions_for(origin.settings, picture.item, origin.listing, origin.source)
        data = cut_tile(origin.source.read(picture.item), origin.settings.composite)
        info = check_picture(data)
        mask = take_mask(origin.masks, picture.item, (info.width, info.height)) if origin.masks else None
    except (CaptionError, PictureError, ItemError) as error:
        return Skipped(name=picture.id, reason=error.reason)
    file, digest = _keep(folders.of(picture.dataset), data, info.extension)
    kept = {} if mask is None else {"mask": _keep(folders.out, mask.data, mask.extension)[0], "mask_kind": mask.kind}
    sample = Sample(
        id=picture.id,
        dataset=picture.dataset,
        file=file,
        sha256=digest,
        width=info.width,
        height=info.height,
        captions=captions,
    )
    return sample.model_copy(update=kept)


def _keep(out: Path, data: bytes, extension: str) -> tuple[str, str]:
    """Write ``data`` under the name that its content gives it, unless it is there; returns its path and SHA-256."""
    digest = hashlib.sha256(data).hexdigest()
    file = f"{FILES_FOLDER}/{digest[:2]}/{digest}.{extension}"
    target = os.path.join(out, file)
    if not (os.path.isfile(target) and os.path.getsize(target) == len(data) and sha256_of(target) == digest):
        write_bytes(target, data)
    return file, digest


def _judge(section: DownloadSection, origins: Sequence[_Origin], skipped: Sequence[tuple[str, Skipped]]) -> None:
    """Raise where a dataset lost too many pictures; ``skipped`` are pairs of dataset and picture."""
    problems: list[str] = []
    for origin in origins:
        name, total = origin.settings.id, len(origin.items)
        lost = [skip for dataset, skip in skipped if dataset == name]
        if len(lost) < total and len(lost) <= section.max_skipped_share * total:
            continue
        shown = "; ".join(f"{on_one_line(skip.name)}: {skip.reason}" for skip in lost[:SHOWN_SKIPS])
        more = f"; and {len(lost) - SHOWN_SKIPS} more (see the log)" if len(lost) > SHOWN_SKIPS else ""
        problems.append(f"dataset {name!r}: {len(lost)} of {total} pictures cannot be used ({shown}{more})")
    if problems:
        raise DatasetError(
            f"{'; '.join(problems)}. Allowed is a share of {section.max_skipped_share:g} and at least one usable "
            "picture: mend or remove the pictures named, or raise max_skipped_share"
        )
