"""The files of a listing, packed: some 70 bytes and the name for each, where objects would take 300 and the name."""

import marshal
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

_LENGTH_BYTES = 4


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
        self._packed = [_pack(item) for item in items]

    def __len__(self) -> int:
        return len(self._packed)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Items": ...
    def __getitem__(self, index: "int | slice") -> "Item | Items":
        return Items(self[place] for place in range(len(self))[index]) if isinstance(index, slice) else self._at(index)

    def _at(self, index: int) -> Item:
        return _unpack(self._packed[index])

    def __iter__(self) -> Iterator[Item]:
        return map(_unpack, self._packed)

    def append(self, item: Item) -> None:
        """Add ``item`` at the end."""
        self._packed.append(_pack(item))

    def sort(self) -> None:
        """Order by name."""
        self._packed.sort()

    def order(self) -> Sequence[int]:
        """The positions by name."""
        if all(one <= other for one, other in pairwise(self._packed)):
            return range(len(self))
        return sorted(range(len(self)), key=self._packed.__getitem__)

    def by_name(self) -> Iterator[Item]:
        """The items ordered by name; these keep their order."""
        return (self[place] for place in self.order())

    def find(self, name: str) -> int:
        """The first position whose item is not before ``name``, when sorted."""
        return bisect_left(self._packed, _start(name))


class ItemsByName(Mapping[str, Item]):
    """Items by their name; sorts them."""

    def __init__(self, items: Items) -> None:
        items.sort()
        self._items = items

    def __getitem__(self, name: str) -> Item:
        place = self._items.find(name)
        if place == len(self._items) or (item := self._items[place]).name != name:
            raise KeyError(name)
        return item

    def __iter__(self) -> Iterator[str]:
        return (item.name for item in self._items)

    def __len__(self) -> int:
        return len(self._items)


def _start(name: str) -> bytes:
    """How the packed form of an item called ``name`` starts: like names sort, as none has a zero in it."""
    return name.encode("utf-8", "surrogatepass") + b"\0"


def _pack(item: Item) -> bytes:
    start = _start(item.name)
    # A file's version is when it was written; a number is half as long as its digits, and once is enough.
    version = None if item.version == str(item.modified) else item.version
    rest = (item.size, version, item.modified, item.checksum, item.captions, item.pixels)
    return start + marshal.dumps(rest) + len(start).to_bytes(_LENGTH_BYTES)


def _unpack(packed: bytes) -> Item:
    start = int.from_bytes(packed[-_LENGTH_BYTES:])
    name = packed[: start - 1].decode("utf-8", "surrogatepass")
    size, version, modified, checksum, captions, pixels = marshal.loads(packed[start:])
    return Item(name, size, str(modified) if version is None else version, modified, checksum, captions, pixels)
