"""``download_dataset``: copy pictures and captions into an artifact, checking every picture.

Pictures are named by their content, so that equal pictures are kept once and a second run copies only what is new.
The fingerprint covers ids, bytes and captions; it does not depend on where the pictures came from or when.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    DatasetArtifact,
    FileEntry,
    Sample,
    Skipped,
    fingerprint,
    sha256_of,
    write_artifact,
    write_atomically,
    write_rows,
)
from kubetuner.config.sections import DatasetSource, DownloadSection
from kubetuner.data.captions import CaptionError, captions_for
from kubetuner.data.pictures import PictureError, check_picture, read_picture
from kubetuner.errors import DatasetError, on_one_line
from kubetuner.progress import Progress
from kubetuner.sources.local import PICTURE_EXTENSIONS, list_pictures, listing_revision
from kubetuner.sources.subset import subset

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
FILES_FOLDER = "files"
MAX_THREADS = 8
SHOWN_SKIPS = 5


@dataclass(frozen=True)
class _Picture:
    """A picture to take in."""

    source: DatasetSource
    root: Path
    path: Path

    @property
    def id(self) -> str:
        name = os.fsencode(self.path.relative_to(self.root).as_posix()).decode("utf-8", "backslashreplace")
        return f"{self.source.id}/{name}"


def download_dataset(section: DownloadSection, out: Path) -> DatasetArtifact:
    """Write the pictures and captions of ``section.datasets`` to ``out`` as a dataset artifact.

    Raises:
        DatasetError: A source cannot be read or is empty, or more than ``max_skipped_share`` of a dataset's pictures
            cannot be used.
    """
    pictures = _list(section.datasets)
    out.mkdir(parents=True, exist_ok=True)
    (out / ARTIFACT_FILE).unlink(missing_ok=True)
    samples: list[Sample] = []
    skipped: list[tuple[str, Skipped]] = []
    entries: dict[str, FileEntry] = {}
    with Progress("download_dataset", len(pictures), "pictures") as progress:
        for picture, result in zip(pictures, _take_all(pictures, out), strict=True):
            if isinstance(result, Skipped):
                logger.warning("skipped %s: %s", on_one_line(result.name), result.reason)
                skipped.append((picture.source.id, result))
            else:
                sample, entry = result
                samples.append(sample)
                entries[entry.path] = entry
            progress.advance(note=f"{len(skipped)} skipped" if skipped else "")
    _judge(section, pictures, skipped)
    _remove_others(out, set(entries))
    write_rows(out, SAMPLES_FILE, samples)
    rows = out / SAMPLES_FILE
    entries[SAMPLES_FILE] = FileEntry(path=SAMPLES_FILE, bytes=rows.stat().st_size, sha256=sha256_of(rows))
    artifact = DatasetArtifact(
        fingerprint=fingerprint("dataset", [[sample.id, sample.sha256, sample.captions] for sample in samples]),
        files=tuple(entries[path] for path in sorted(entries)),
        num_samples=len(samples),
        skipped=tuple(skip for _, skip in skipped),
    )
    write_artifact(out, artifact)
    logger.info("download_dataset: %d samples, %d skipped", len(samples), len(skipped))
    return artifact


def _list(sources: Sequence[DatasetSource]) -> list[_Picture]:
    """Every source's pictures; what is wrong with any source is told at once."""
    pictures: list[_Picture] = []
    problems: list[str] = []
    for source in sources:
        root = Path(source.instance_data_dir)
        try:
            found = list_pictures(root)
            if source.revision and listing_revision(root) != source.revision:
                logger.warning("dataset %s: %s has changed since the run was planned", source.id, root)
        except DatasetError as error:
            problems.append(f"dataset {source.id!r}: {error}")
            continue
        if not found:
            known = " ".join(sorted(PICTURE_EXTENSIONS))
            problems.append(f"dataset {source.id!r}: no picture in {root} (looked for {known})")
        pictures += (_Picture(source, root, path) for path in subset(found, source.id, source.max_num_samples))
    if problems:
        raise DatasetError("; ".join(problems))
    return pictures


def _take_all(pictures: Sequence[_Picture], out: Path) -> Iterator[tuple[Sample, FileEntry] | Skipped]:
    """Take in ``pictures`` on several threads, in order."""
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="download")
    try:
        yield from pool.map(lambda picture: _take(picture, out), pictures)
    finally:
        pool.shutdown(cancel_futures=True)


def _take(picture: _Picture, out: Path) -> tuple[Sample, FileEntry] | Skipped:
    """Check one picture and copy its bytes; the bytes that are hashed are the ones that were decoded."""
    try:
        captions = captions_for(picture.source, picture.path, picture.root)
        _refuse_unprintable(picture, captions)
        data = read_picture(picture.path)
        info = check_picture(data)
    except (CaptionError, PictureError) as error:
        return Skipped(name=picture.id, reason=error.reason)
    digest = hashlib.sha256(data).hexdigest()
    file = f"{FILES_FOLDER}/{digest[:2]}/{digest}.{info.extension}"
    target = out / file
    if not (target.is_file() and target.stat().st_size == len(data) and sha256_of(target) == digest):
        write_atomically(target, lambda path: _write_bytes(path, data))
    sample = Sample(
        id=picture.id,
        dataset=picture.source.id,
        file=file,
        sha256=digest,
        width=info.width,
        height=info.height,
        captions=captions,
    )
    return sample, FileEntry(path=file, bytes=len(data), sha256=digest)


def _refuse_unprintable(picture: _Picture, captions: tuple[str, ...]) -> None:
    """Refuse names that are not UTF-8: they have no place in a JSON file."""
    try:
        "".join((str(picture.path), *captions)).encode()
    except UnicodeEncodeError as error:
        raise PictureError("its name is not UTF-8; rename it") from error


def _judge(section: DownloadSection, pictures: Sequence[_Picture], skipped: Sequence[tuple[str, Skipped]]) -> None:
    """Raise where a dataset lost too many pictures; ``skipped`` are pairs of dataset and picture."""
    problems: list[str] = []
    for source in section.datasets:
        total = sum(picture.source.id == source.id for picture in pictures)
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
