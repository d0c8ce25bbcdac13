"""Pictures in a folder (``type: local``).

Links are followed, as volumes mounted from Kubernetes are made of them.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kubetuner.config.sections.sources import DatasetSource
from kubetuner.errors import DatasetError
from kubetuner.sources.base import Item, ItemError, Listing, folder_listing, is_picture, is_text
from kubetuner.threads import available_cpus


class LocalSource:
    """The folder ``instance_data_dir``."""

    key = "instance_data_dir"
    readers = available_cpus()

    def __init__(self, settings: DatasetSource) -> None:
        self._root = Path(settings.instance_data_dir)
        self.place = str(self._root)

    def listing(self) -> Listing:
        """See :class:`Source`."""
        if not self._root.is_dir():
            raise DatasetError(f"{self._root} is not a folder; check {self.key}")
        names = _walk(str(self._root), "", ())
        return folder_listing(self._item(name) for name in names if is_picture(name) or is_text(name))

    def _item(self, name: str) -> Item:
        try:
            return file_item(self._root, name)
        except DatasetError:  # a link to nothing: one picture that cannot be read, and no reason to stop the rest
            return Item(name)

    def read(self, item: Item) -> bytes:
        """See :class:`Source`."""
        return read_file(self._root, item)

    def header(self, item: Item, length: int) -> bytes:
        """See :class:`Source`."""
        return read_file(self._root, item, length)

    def read_table(self, path: str) -> tuple[Item, bytes]:
        """See :class:`~kubetuner.sources.captioned.HoldsTables`."""
        file = Path(path)
        try:
            item = file_item(file.parent, file.name)
            return replace(item, name=path), read_file(file.parent, item)
        except ItemError as error:
            raise DatasetError(f"{path} {error.reason}; check parquet.path") from error

    def close(self) -> None:
        """Nothing is held."""


def file_item(root: Path, name: str) -> Item:
    """The file ``name`` below ``root``; its version is its modification time.

    Raises:
        DatasetError: It is a link to nothing, or may not be looked at.
    """
    try:
        status = os.stat(_path(root, name))
    except OSError as error:
        raise DatasetError(
            f"{root / name} cannot be read ({error.strerror or error}); check the link or rights"
        ) from error
    return Item(name, status.st_size, str(status.st_mtime_ns), status.st_mtime_ns)


def read_file(root: Path, item: Item, length: int = -1) -> bytes:
    """The first ``length`` bytes of ``item`` below ``root``, all of them when negative.

    Raises:
        ItemError: It cannot be read.
        DatasetError: It was written since it was listed.
    """
    try:
        with open(_path(root, item.name), "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ItemError("is not a file but a pipe, a device or the like")
            data = file.read(length)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise ItemError(f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a zero in a name that a table gives
        raise ItemError(f"cannot be read ({error})") from error
    if (str(status.st_mtime_ns), status.st_size) != (item.version, item.size):
        raise DatasetError(f"{root / item.name} was replaced while the step ran; run it again")
    return data


def _without_waiting(path: str, flags: int) -> int:
    """A descriptor at once: opening a pipe would wait for somebody who writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle; whoever opens the file tells of it
        return False


def _path(root: Path, name: str) -> str:
    """``root / name`` as text: of the parts of path objects Python keeps a table, which grows with their number."""
    return os.path.join(root, name)


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Names of the files below ``folder``, which is called ``prefix`` itself.

    ``above`` are the real folders it lies in, so that a link to one of them ends.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in _entries(folder):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, real))
        else:
            yield f"{prefix}{entry.name}"


def _entries(folder: str) -> "Iterator[os.DirEntry[str]]":
    """What ``folder`` holds, one by one: there may be very much in it."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise DatasetError(f"{folder} cannot be listed ({error.strerror or error}); check its rights") from error
