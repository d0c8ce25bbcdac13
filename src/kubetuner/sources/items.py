"""The files of a listing; they stay on disk, so that any number fits into memory."""

import marshal
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from kubetuner.scratch import Scratch

# Places count from 1.
_TABLE = "CREATE TABLE {} (place INTEGER PRIMARY KEY, name BLOB, rest BLOB)"
_SELECT = "SELECT name, rest FROM items"
_WRITTEN_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Item:
    """One file of a source.

    Attributes:
        name: Path relative to the source's root, with ``/``; unique in a listing.
        size: Bytes; -1 where the source does not say.
        version: What pins the bytes; empty where the source has no versions.
        modified: When it was written, in nanoseconds since 1970; 0 where the source does not say.
        checksum: ``md5:``, ``sha256:``, ``git:`` (blob id) or ``crc32c:`` (base64) and the digest; empty for none.
        captions: Captions that the source itself holds, such as a table's column; ``None`` where it holds none.
        pixels: (width, height) where the source's table says so.
    """

    name: str
    size: int = -1
    version: str = ""
    modified: int = 0
    checksum: str = ""
    captions: tuple[str, ...] | None = None
    pixels: tuple[int, int] | None = None


class Items(Sequence[Item]):
    """Items in a given order."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._scratch = Scratch(_TABLE.format("items"))
        self._length = 0
        self._last = b""
        self._sorted, self._indexed = True, False
        self._waiting: list[tuple[int, bytes, bytes]] = []
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Items": ...
    def __getitem__(self, index: "int | slice") -> "Item | Items":
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else Items(map(self._at, places))

    def _at(self, place: int) -> Item:
        return next(self._found("WHERE place = ?", place + 1))

    def _found(self, which: str, *values: int | bytes) -> Iterator[Item]:
        return (_unpack(*row) for row in self._written().rows(f"{_SELECT} {which}", values))

    def __iter__(self) -> Iterator[Item]:
        return self._found("ORDER BY place")

    def append(self, item: Item) -> None:
        """Add ``item`` at the end."""
        name = _encoded(item.name)
        self._sorted = self._sorted and self._last <= name
        self._length, self._last = self._length + 1, name
        self._waiting.append((self._length, name, _pack(item)))
        if len(self._waiting) >= _WRITTEN_AT_ONCE:
            self._written()

    def _written(self) -> Scratch:
        """The table with all items in it."""
        if self._waiting:
            rows, self._waiting = self._waiting, []
            self._scratch.run_each("INSERT INTO items VALUES (?, ?, ?)", rows)
        return self._scratch

    def sort(self) -> None:
        """Order by name."""
        if not self._sorted:
            scratch = self._written()
            scratch.run(_TABLE.format("ordered"))
            scratch.run("INSERT INTO ordered (name, rest) SELECT name, rest FROM items ORDER BY name")
            scratch.run("DROP TABLE items")
            scratch.run("ALTER TABLE ordered RENAME TO items")
            (self._last,) = scratch.row("SELECT max(name) FROM items") or (b"",)
            self._sorted, self._indexed = True, False

    def order(self) -> Sequence[int]:
        """The positions by name."""
        if self._sorted:
            return range(len(self))
        rows = self._written().rows("SELECT place - 1 FROM items ORDER BY name, place")
        return array("I", (place for (place,) in rows))

    def by_name(self) -> Iterator[Item]:
        """The items ordered by name; these keep their order."""
        return iter(self) if self._sorted else self._found("ORDER BY name, place")

    def find(self, name: str) -> Item | None:
        """The item called ``name``."""
        if not self._indexed:
            self._written().run("CREATE INDEX IF NOT EXISTS names ON items (name)")
            self._indexed = True
        found = self._written().row(f"{_SELECT} WHERE name = ?", (_encoded(name),))
        return None if found is None else _unpack(*found)


class ItemsByName(Mapping[str, Item]):
    """Items by their name."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def __getitem__(self, name: str) -> Item:
        item = self._items.find(name)
        if item is None:
            raise KeyError(name)
        return item

    def __iter__(self) -> Iterator[str]:
        return (item.name for item in self._items.by_name())

    def __len__(self) -> int:
        return len(self._items)


def _encoded(name: str) -> bytes:
    """UTF-8, which sorts as the characters do, also of names that are none."""
    return name.encode("utf-8", "surrogatepass")


def _pack(item: Item) -> bytes:
    """All of ``item`` but its name."""
    # A file's version is when it was written; a number is half as long as its digits, and once is enough.
    version = None if item.version == str(item.modified) else item.version
    return marshal.dumps((item.size, version, item.modified, item.checksum, item.captions, item.pixels))


def _unpack(name: bytes, packed: bytes) -> Item:
    size, version, modified, checksum, captions, pixels = marshal.loads(packed)
    version = str(modified) if version is None else version
    return Item(name.decode("utf-8", "surrogatepass"), size, version, modified, checksum, captions, pixels)
