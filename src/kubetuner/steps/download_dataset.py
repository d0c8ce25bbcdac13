"""``download_dataset``: copy pictures and captions into an artifact, checking every picture.

Pictures are named by their content, so that equal pictures are kept once and a second run copies only what is new.
The fingerprint covers ids, bytes and captions; it does not depend on where the pictures came from or when.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    SAMPLES_FILE,
    DatasetArtifact,
    FileEntry,
    Sample,
    Skipped,
    describe_file,
    fingerprint,
    read_artifact,
    sha256_of,
    verify_files,
    write_artifact,
    write_atomically,
    write_rows,
)
from kubetuner.config.source_sections import DatasetSource, DownloadSection
from kubetuner.data.captions import CaptionError, captions_for
from kubetuner.data.pictures import PictureError, check_picture
from kubetuner.errors import DatasetError, on_one_line
from kubetuner.progress import Progress
from kubetuner.sources.base import PICTURE_EXTENSIONS, Item, ItemError, Listing, Source, as_planned
from kubetuner.sources.subset import subset
from kubetuner.sources.switch import open_source
from kubetuner.sources.threads import in_threads
from kubetuner.steps.download_masks import MaskOrigin, open_masks, take_mask

logger = logging.getLogger(__name__)

FILES_FOLDER = "files"
SHOWN_SKIPS = 5


@dataclass(frozen=True)
class _Origin:
    """An opened dataset."""

    settings: DatasetSource
    source: Source
    listing: Listing


@dataclass(frozen=True)
class _Picture:
    """A picture to take in."""

    origin: _Origin
    item: Item
    masks: MaskOrigin | None

    @property
    def dataset(self) -> str:
        return self.origin.settings.id

    @property
    def id(self) -> str:
        return f"{self.dataset}/{os.fsencode(self.item.name).decode('utf-8', 'backslashreplace')}"


def download_dataset(section: DownloadSection, out: Path) -> DatasetArtifact:
    """Write the pictures and captions of ``section.datasets`` to ``out`` as a dataset artifact.

    Raises:
        DatasetError: A source cannot be read or is empty, or more than ``max_skipped_share`` of a dataset's pictures
            cannot be used.
    """
    from kubetuner.tracking import track

    out.mkdir(parents=True, exist_ok=True)
    (out / ARTIFACT_FILE).unlink(missing_ok=True)
    with track("download_dataset", {"datasets": ", ".join(source.id for source in section.datasets)}) as run:
        artifact = _download(section, out)
        run.log_metrics({"samples": artifact.num_samples, "skipped": len(artifact.skipped)}, 0)
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


def _download(section: DownloadSection, out: Path) -> DatasetArtifact:
    taken: list[tuple[_Picture, Sample, tuple[FileEntry, ...]]] = []
    skipped: list[tuple[str, Skipped]] = []
    with ExitStack() as stack:
        pictures = _list(section, stack)
        progress = stack.enter_context(Progress("download_dataset", len(pictures), "pictures"))
        for picture, result in zip(pictures, _take_all(pictures, out), strict=True):
            if isinstance(result, Skipped):
                logger.warning("skipped %s: %s", on_one_line(result.name), result.reason)
                skipped.append((picture.dataset, result))
            else:
                taken.append((picture, *result))
            progress.advance(note=f"{len(skipped)} skipped" if skipped else "")
    _judge(section, pictures, skipped)
    samples = _in_order(section, taken)
    entries = {entry.path: entry for _, _, files in taken for entry in files}
    _remove_others(out, set(entries))
    write_rows(out, SAMPLES_FILE, samples)
    entries[SAMPLES_FILE] = describe_file(out, SAMPLES_FILE)
    return DatasetArtifact(
        fingerprint=fingerprint("dataset", [_content(sample) for sample in samples]),
        files=tuple(entries[path] for path in sorted(entries)),
        num_samples=len(samples),
        skipped=tuple(skip for _, skip in skipped),
    )


def _content(sample: Sample) -> list[object]:
    """What a sample is, wherever it came from."""
    mask = [sample.mask, sample.mask_kind] if sample.mask else []
    return [sample.id, sample.sha256, sample.captions, *mask]


def _list(section: DownloadSection, stack: ExitStack) -> list[_Picture]:
    """Every dataset's pictures; what is wrong with any dataset is told at once. ``stack`` closes the sources."""
    pictures: list[_Picture] = []
    problems: list[str] = []
    masks = {dataset: one for one in section.masks for dataset in one.of}
    for settings in section.datasets:
        try:
            source = stack.enter_context(closing(open_source(settings)))
            listing = as_planned(source.listing(), settings.revision, settings.newest)
            chosen = subset(listing.pictures, settings.id, settings.max_num_samples)
            theirs = open_masks(masks[settings.id], chosen, stack) if settings.id in masks else None
        except DatasetError as error:
            problems.append(f"dataset {settings.id!r}: {error}")
            continue
        if not listing.pictures:
            known = " ".join(sorted(PICTURE_EXTENSIONS))
            problems.append(f"dataset {settings.id!r}: no picture in {source.place} (looked for {known})")
        origin = _Origin(settings, source, listing)
        pictures += (_Picture(origin, item, theirs) for item in chosen)
    if problems:
        raise DatasetError("; ".join(problems))
    return pictures


def _in_order(section: DownloadSection, taken: Sequence[tuple[_Picture, Sample, object]]) -> list[Sample]:
    """Samples by dataset, as the data file has them, and name; the order of reading differs from source to source."""
    position = {settings.id: index for index, settings in enumerate(section.datasets)}
    ordered = sorted(taken, key=lambda one: (position[one[0].dataset], one[0].item.name))
    return [sample for _, sample, _ in ordered]


def _take_all(pictures: Sequence[_Picture], out: Path) -> Iterator[tuple[Sample, tuple[FileEntry, ...]] | Skipped]:
    """Take in ``pictures`` on several threads, in order."""
    readers = max((picture.origin.source.readers for picture in pictures), default=1)
    return in_threads(lambda picture: _take(picture, out), pictures, readers, "download")


def _take(picture: _Picture, out: Path) -> tuple[Sample, tuple[FileEntry, ...]] | Skipped:
    """Check one picture, and its mask, and copy their bytes; the bytes hashed are the ones that were decoded."""
    try:
        origin = picture.origin
        captions = captions_for(origin.settings, picture.item, origin.listing, origin.source)
        _refuse_unprintable(picture, captions)
        data = origin.source.read(picture.item)
        info = check_picture(data)
        mask = take_mask(picture.masks, picture.item, (info.width, info.height)) if picture.masks else None
    except (CaptionError, PictureError, ItemError) as error:
        return Skipped(name=picture.id, reason=error.reason)
    entry = _keep(out, data, info.extension)
    sample = Sample(
        id=picture.id,
        dataset=picture.dataset,
        file=entry.path,
        sha256=entry.sha256,
        width=info.width,
        height=info.height,
        captions=captions,
    )
    if mask is None:
        return sample, (entry,)
    kept = _keep(out, mask.data, mask.extension)
    return sample.model_copy(update={"mask": kept.path, "mask_kind": mask.kind}), (entry, kept)


def _keep(out: Path, data: bytes, extension: str) -> FileEntry:
    """Write ``data`` under the name that its content gives it, unless it is there."""
    digest = hashlib.sha256(data).hexdigest()
    file = f"{FILES_FOLDER}/{digest[:2]}/{digest}.{extension}"
    target = out / file
    if not (target.is_file() and target.stat().st_size == len(data) and sha256_of(target) == digest):
        write_atomically(target, lambda path: _write_bytes(path, data))
    return FileEntry(path=file, bytes=len(data), sha256=digest)


def _refuse_unprintable(picture: _Picture, captions: tuple[str, ...]) -> None:
    """Refuse names that are not UTF-8: they have no place in a JSON file."""
    try:
        "".join((picture.item.name, *captions)).encode()
    except UnicodeEncodeError as error:
        raise PictureError("its name is not UTF-8; rename it") from error


def _judge(section: DownloadSection, pictures: Sequence[_Picture], skipped: Sequence[tuple[str, Skipped]]) -> None:
    """Raise where a dataset lost too many pictures; ``skipped`` are pairs of dataset and picture."""
    problems: list[str] = []
    for source in section.datasets:
        total = sum(picture.dataset == source.id for picture in pictures)
        lost = [skip for dataset, skip in skipped if dataset == source.id]
        if len(lost) < total and len(lost) <= section.max_skipped_share * total:
            continue
        shown = "; ".join(f"{on_one_line(skip.name)}: {skip.reason}" for skip in lost[:SHOWN_SKIPS])
        more = f"; and {len(lost) - SHOWN_SKIPS} more (see the log)" if len(lost) > SHOWN_SKIPS else ""
        problems.append(f"dataset {source.id!r}: {len(lost)} of {total} pictures cannot be used ({shown}{more})")
    if problems:
        raise DatasetError(
            f"{'; '.join(problems)}. Allowed is a share of {section.max_skipped_share:g} and at least one usable "
            "picture: mend or remove the pictures named, or raise max_skipped_share"
        )


def _remove_others(out: Path, wanted: set[str]) -> None:
    """Remove pictures that an earlier run left in ``out`` and that are no longer in the dataset."""
    for path in (out / FILES_FOLDER).rglob("*"):
        if path.is_file() and path.relative_to(out).as_posix() not in wanted:
            path.unlink()


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
