"""Pictures in a folder.

Files and folders whose names start with a dot are left out (editors and notebooks keep copies there). Links are
followed, as volumes mounted from Kubernetes are made of them.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from kubetuner.errors import DatasetError

PICTURE_EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".jp2"}
)
CAPTION_EXTENSIONS = frozenset({".txt"})


def list_pictures(root: Path) -> tuple[Path, ...]:
    """Every picture below ``root``, by extension, sorted by its path relative to ``root``.

    Raises:
        DatasetError: ``root`` is no folder, or a folder below it cannot be listed.
    """
    return tuple(_files(root, PICTURE_EXTENSIONS))


def listing_revision(root: Path) -> str:
    """SHA-256 (hex) over name, size and modification time of every picture and caption file below ``root``.

    Raises:
        DatasetError: ``root`` is no folder, or a folder below it cannot be listed.
    """
    digest = hashlib.sha256()
    for path in _files(root, PICTURE_EXTENSIONS | CAPTION_EXTENSIONS):
        try:
            status = path.stat()
        except OSError as error:
            raise DatasetError(
                f"{path} cannot be read ({error.strerror or error}); check the link or rights"
            ) from error
        name = os.fsencode(path.relative_to(root).as_posix())
        digest.update(b"%d %d %d " % (len(name), status.st_size, status.st_mtime_ns) + name)
    return digest.hexdigest()


def _files(root: Path, extensions: frozenset[str]) -> list[Path]:
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder; check instance_data_dir")
    found = (path for path in _walk(root, ()) if path.suffix.lower() in extensions)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle; whoever opens the file tells of it
        return False


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Files below ``folder``; ``above`` are the real folders it lies in, so that a link to one of them ends."""
    real = folder.resolve()
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be listed ({error.strerror or error}); check its rights") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(folder / entry.name, (*above, real))
        else:
            yield folder / entry.name
