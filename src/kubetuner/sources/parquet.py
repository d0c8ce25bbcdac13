"""Pictures inside the parquet files of a hub repository.

Names, captions and what a filter compares are read by range, without the pictures. A step that needs every picture
takes one file after the other: the file is fetched whole, compared with its checksum and kept in a temporary file while
its rows are read, so a dataset larger than the disk passes through; a file of which the filter leaves nothing is not
fetched. ``plan`` needs sizes only: it uses the columns ``width`` and ``height`` where they exist, and otherwise streams
the row groups.
"""

import hashlib
import io
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any

from kubetuner.config.sections.sources import HubDataset
from kubetuner.errors import DatasetError
from kubetuner.sources.base import Item, ItemError, Listing, PassingError, first_line, listing_of, retrying
from kubetuner.sources.filters import KEY, NAME_COLUMNS, FilterError, RowTest, Tally
from kubetuner.sources.table import captions_of
from kubetuner.threads import in_threads

if TYPE_CHECKING:
    from pyarrow import Schema
    from pyarrow.parquet import ParquetFile

CHUNK_BYTES = 32 << 20
_GROUPS_KEPT, _FILES_KEPT = 4, 2
_LISTED_AT_ONCE = 8
METADATA_TABLE = "metadata.parquet"
"""Describes the pictures beside it and holds none."""
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        name: Relative to the dataset's folder.
        path: Relative to the repository.
        size: Bytes.
        checksum: As in :class:`Item`.
    """

    name: str
    path: str
    size: int
    checksum: str


Fetch = Callable[[HubFile, int, int | None, Callable[[bytes], bytes]], bytes]


def split_files(files: Sequence[HubFile], split: str) -> list[HubFile]:
    """The parquet files of ``split``; empty where there are no parquet files at all.

    A file belongs to the split that its name, or a folder above it, starts with; without any such name, to ``train``.

    Raises:
        DatasetError: There are parquet files, and none is of this split.
    """
    tables = sorted((file for file in files if _holds_pictures(file.name)), key=lambda file: file.name)
    words = {file.name: {re.split(r"[-_.]", part)[0] for part in file.name.split("/")} for file in tables}
    found = [file for file in tables if split in words[file.name]]
    named = sorted({word for each in words.values() for word in each if word in _SPLITS})
    if not found and tables and (named or split != "train"):
        there = ", ".join(named) or "train, as no file is named after a split"
        raise DatasetError(f"it has no parquet file of split {split!r} (there are: {there}); check split")
    return found or tables


def _holds_pictures(name: str) -> bool:
    return name.lower().endswith(".parquet") and name.rpartition("/")[2] != METADATA_TABLE


def folder_split(pictures: Sequence[str], split: str) -> str:
    """The folder, with a ``/``, that holds the pictures of ``split``; empty where folders are not named after splits.

    They are where each picture is in one that is: ``train/1.png``, ``test/2.png``. Beside a folder ``boat``, one called
    ``train`` is a subject.

    Raises:
        DatasetError: They are, and none is of this split.
    """
    folders = {name.partition("/")[0] if "/" in name else "" for name in pictures}
    if len(folders) < 2 or not folders <= set(_SPLITS):
        return ""
    if split not in folders:
        raise DatasetError(
            f"it has no folder of split {split!r} (there are: {', '.join(sorted(folders))}); check split"
        )
    return f"{split}/"


@dataclass(frozen=True)
class _Place:
    """Where a row's picture is."""

    file: int
    group: int
    row: int


@dataclass(frozen=True, slots=True)
class _Row:
    """What a row says of its picture.

    Attributes:
        path: The path that the picture holds; empty for none.
        captions: Of the caption column.
        pixels: (width, height) where there are such columns.
        refusal: Why the dataset's filter leaves it out, or nothing.
    """

    path: str
    place: _Place
    captions: tuple[str, ...] | None
    pixels: tuple[int, int] | None
    refusal: str


@dataclass(frozen=True)
class _Columns:
    """What is read of every row: ``read`` are columns, or fields of them, ``names`` those that name the picture."""

    read: list[str]
    names: list[str]
    sized: bool


class ParquetPictures:
    """The rows of ``files`` as pictures; safe to call from several threads.

    Args:
        files: The parquet files.
        hub: Names of the columns.
        test: Which rows are taken in.
        fetch: Reads a range of a file.
    """

    def __init__(self, files: Sequence[HubFile], hub: HubDataset, test: RowTest, fetch: Fetch) -> None:
        self._files, self._hub, self._test, self._fetch = files, hub, test, fetch
        self._places: dict[str, _Place] = {}
        self._ranged = _Kept(len(files), self._open_ranged)
        self._whole = _Kept(_FILES_KEPT, self._open_whole)
        self._groups = _Kept(_GROUPS_KEPT, lambda key: self._read_group(self._whole, key))
        self._glances = _Kept(_GROUPS_KEPT, lambda key: self._read_group(self._ranged, key))

    def listing(self, commit: str) -> Listing:
        """One picture a row, in the order of the files; named by the path that the row holds, else by number."""
        found = in_threads(self._rows, range(len(self._files)), _LISTED_AT_ONCE, "parquet")
        rows = [row for each in found for row in each]
        uses = Counter(row.path for row in rows)
        items, tally = [], Tally()
        for row in rows:
            place = row.place
            stem = self._files[place.file].name.removesuffix(".parquet")
            name = row.path if row.path and uses[row.path] == 1 else f"{stem}/{place.group:04d}-{place.row:06d}"
            if row.refusal:
                tally.add(row.refusal, name)
                continue
            self._places[name] = place
            items.append(Item(name, version=commit, captions=row.captions, pixels=row.pixels))
        return replace(listing_of(items, revision=commit), filtered=tally.result())

    def read(self, item: Item) -> bytes:
        """The picture's bytes, out of a file whose checksum was right."""
        return self._picture(self._groups, item)

    def glance(self, item: Item) -> bytes:
        """The picture's bytes, read by range."""
        return self._picture(self._glances, item)

    def close(self) -> None:
        """Close and remove temporary files."""
        for kept in (self._ranged, self._whole, self._groups, self._glances):
            kept.clear()

    def _picture(self, groups: "_Kept", item: Item) -> bytes:
        place = self._places[item.name]
        cell = groups.get((place.file, place.group))[place.row]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise ItemError(f"column {self._hub.image_column!r} holds no bytes in this row")
        return data

    def _rows(self, index: int) -> list[_Row]:
        """What every row of a file says, without its picture."""
        file, image = self._files[index], self._hub.image_column
        table: ParquetFile = self._ranged.get(index)
        columns = self._columns(file, table.schema_arrow)
        rows = []
        for group in range(table.num_row_groups):
            with _naming(file):
                cells = table.read_row_group(group, columns=columns.read).to_pylist() if columns.read else []
            cells = cells or [{}] * table.metadata.row_group(group).num_rows
            for number, cell in enumerate(cells):
                path = str((cell.get(image) or {}).get("path") or "").lstrip("/")
                names = [name for name in (path, *(str(cell[column] or "") for column in columns.names)) if name]
                try:
                    refusal = self._test.refusal(names, cell)
                except FilterError as error:
                    raise FilterError(f"{file.path}, row {number} of group {group}: {error}") from error
                size = _trusted(cell["width"], cell["height"]) if columns.sized else None
                captions = captions_of(cell.get(self._hub.caption_column))
                rows.append(_Row(path, _Place(index, group, number), captions, size, refusal))
        return rows

    def _columns(self, file: HubFile, schema: "Schema") -> _Columns:
        """The columns to read; all that are missing are told at once."""
        import pyarrow as pa

        hub, test = self._hub, self._test
        wanted = {hub.image_column: "image_column"}
        wanted |= {hub.caption_column: "caption_column"} if hub.caption_column else {}
        wanted |= test.columns
        if missing := [f"{name!r} ({key})" for name, key in wanted.items() if name not in schema.names]:
            known = ", ".join(schema.names)
            raise DatasetError(f"{file.path} has no column {' and no column '.join(missing)}; it has {known}")
        kind = schema.field(hub.image_column).type
        has_path = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        names = [name for name in NAME_COLUMNS if test.by_name and name in schema.names]
        if test.by_name and not has_path and not names:
            told = " or ".join(NAME_COLUMNS)
            raise FilterError(f"{file.path}: rows have no names for {KEY} to match, as there is no column {told}")
        sized = all(
            name in schema.names and pa.types.is_integer(schema.field(name).type) for name in ("width", "height")
        )
        read = [name for name in wanted if name != hub.image_column]
        read += [f"{hub.image_column}.path"] if has_path else []
        read += [*names, *(("width", "height") if sized else ())]
        return _Columns(list(dict.fromkeys(read)), names, sized)

    def _read_group(self, files: "_Kept", key: tuple[int, int]) -> list[object]:
        index, group = key
        column = self._hub.image_column
        # The file is shared by threads and its position is not.
        with files.lock(index), _naming(self._files[index]):
            cells: list[object] = files.get(index).read_row_group(group, columns=[column])[column].to_pylist()
        return cells

    def _open_ranged(self, index: int) -> "ParquetFile":
        file = self._files[index]
        return _parquet(file, io.BufferedReader(_Ranged(file, self._fetch), buffer_size=1 << 16))

    def _open_whole(self, index: int) -> "ParquetFile":
        file = self._files[index]
        return _parquet(file, retrying(f"reading {file.path}", lambda: _download(file, self._fetch)))


def _trusted(width: int | None, height: int | None) -> tuple[int, int] | None:
    """A row's (width, height), unless no picture is like that: then the picture itself is measured."""
    return (width, height) if width and height and width > 0 and height > 0 else None


def _parquet(file: HubFile, stream: IO[bytes] | io.BufferedIOBase) -> "ParquetFile":
    import pyarrow.parquet as pq

    try:
        with _naming(file):
            return pq.ParquetFile(stream)
    except DatasetError:
        stream.close()
        raise


@contextmanager
def _naming(file: HubFile) -> Iterator[None]:
    """Name the file in what goes wrong while it is read."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file.path} cannot be read as parquet ({first_line(error)})") from error


def _download(file: HubFile, fetch: Fetch) -> IO[bytes]:
    """``file`` in a temporary file that goes when it is closed, part by part, compared with its checksum."""
    kind, _, expected = file.checksum.partition(":")
    digest = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    if kind == "git":
        digest.update(b"blob %d\0" % file.size)
    stream = tempfile.TemporaryFile(prefix="kubetuner-parquet-")  # noqa: SIM115 - closed with the table made of it
    try:
        for start in range(0, file.size, CHUNK_BYTES):
            part = fetch(file, start, min(start + CHUNK_BYTES, file.size), bytes)
            digest.update(part)
            stream.write(part)
        if digest.hexdigest() != expected:
            raise PassingError(f"{file.path} arrived damaged: its {kind} checksum is wrong")
        stream.seek(0)
    except BaseException:
        stream.close()
        raise
    return stream


class _Ranged(io.RawIOBase):
    """A file that is read by range."""

    def __init__(self, file: HubFile, fetch: Fetch) -> None:
        self._file, self._fetch, self._position = file, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._file.size)
        if stop <= self._position:
            return 0
        data = self._fetch(self._file, self._position, stop, bytes)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _Kept:
    """The results last used of ``make``, by key; each is made once, also when several threads ask for it."""

    def __init__(self, most: int, make: Callable[[Any], Any]) -> None:
        self._most, self._make = most, make
        self._values: dict[object, Any] = {}
        self._locks: dict[object, threading.RLock] = {}
        self._guard = threading.Lock()

    def lock(self, key: object) -> threading.RLock:
        """What to hold while a value that is not safe for threads is used."""
        with self._guard:
            return self._locks.setdefault(key, threading.RLock())

    def get(self, key: object) -> Any:
        with self.lock(key):
            with self._guard:
                if key in self._values:
                    self._values[key] = self._values.pop(key)  # the youngest again
                    return self._values[key]
            made = self._make(key)
            with self._guard:
                self._values[key] = made
                old = list(self._values)[: -self._most]
        for each in old:
            self._drop(each)
        return made

    def clear(self) -> None:
        for key in list(self._values):
            self._drop(key)

    def _drop(self, key: object) -> None:
        """Close a value, unless a thread is using it: the next one that is made drops it."""
        lock = self.lock(key)
        if not lock.acquire(blocking=False):
            return
        try:
            with self._guard:
                value = self._values.pop(key, None)
            if hasattr(value, "close"):
                value.close(force=True)
        finally:
            lock.release()
