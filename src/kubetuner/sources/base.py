"""What a source of pictures is, and what all kinds of sources share.

A source lists its files once and then reads exactly what it listed: each file carries the version (modification time,
generation, entity tag, commit) that its bytes are read at, so a file that is replaced in between is found out.
Hidden files and folders (a name that starts with a dot) are left out: editors and notebooks keep copies there.
"""

import base64
import hashlib
import logging
import os
import posixpath
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import merge
from itertools import chain
from typing import Protocol, TypeVar

from kubetuner.errors import DatasetError
from kubetuner.sources.items import Item as Item
from kubetuner.sources.items import Items, ItemsByName

logger = logging.getLogger(__name__)

PICTURE_EXTENSIONS = frozenset(
    {
        ".apng", ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".mpo", ".pbm",
        ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
        # Pillow cannot read these; so they are named where they would silently be missing.
        ".heic", ".heif", ".jxl",
    }
)  # fmt: skip
CAPTION_EXTENSIONS = frozenset({".txt"})
HEADER_BYTES = 1 << 16
"""Enough for the size of nearly every picture; metadata before it can be longer."""
ATTEMPTS = 5
LONGEST_PAUSE_SECONDS = 20.0
_NAMED = 5

Result = TypeVar("Result")


class ItemError(DatasetError):
    """One file that cannot be had although its source works; ``reason`` says why without naming it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class PassingError(Exception):
    """A failure after which the same request may succeed; :func:`retrying` turns the last one into a DatasetError.

    ``wait`` is how many seconds the server asked to be left alone.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Filtered:
    """Pictures that a dataset's filter leaves out, all for one reason.

    Attributes:
        reason: What of ``filter_func`` leaves them out.
        count: How many; at least 1.
        names: The first few.
    """

    reason: str
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """What a source holds.

    Attributes:
        pictures: In the order that is best to read them in.
        texts: Caption files by name.
        revision: Hex digest or commit; equal revisions hold equal files.
        newest: The latest :attr:`Item.modified`.
        filtered: What the dataset's filter has left out already; most first.
    """

    pictures: Items
    texts: Mapping[str, Item]
    revision: str
    newest: int
    filtered: tuple[Filtered, ...] = ()


class Source(Protocol):
    """Where one dataset's files come from. Its methods may be called from several threads."""

    @property
    def place(self) -> str:
        """What to call it in messages: a folder, an address, a table."""

    @property
    def key(self) -> str:
        """The key of the data file that names the place."""

    @property
    def readers(self) -> int:
        """How many reads at once pay off."""

    def listing(self) -> Listing:
        """Every picture and caption file.

        Raises:
            DatasetError: The source cannot be listed; the message names what to check.
        """

    def read(self, item: Item) -> bytes:
        """The bytes of ``item`` as they were when it was listed, compared with its checksum where it has one.

        Raises:
            ItemError: This file cannot be had; others may.
            DatasetError: The source fails, or the file was replaced since it was listed.
        """

    def header(self, item: Item, length: int) -> bytes:
        """The first ``length`` bytes of ``item``, or more where that costs nothing; raises as :meth:`read` does."""

    def close(self) -> None:
        """Let go of connections and temporary files."""


def is_picture(name: str) -> bool:
    """Whether ``name`` is a visible file with the extension of a picture."""
    return _extension(name) in PICTURE_EXTENSIONS and not _hidden(name)


def is_text(name: str) -> bool:
    """Whether ``name`` is a visible caption file."""
    return _extension(name) in CAPTION_EXTENSIONS and not _hidden(name)


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def name_fault(name: str) -> str:
    """Why a picture called ``name`` cannot be used, or nothing."""
    try:
        name.encode()
    except UnicodeEncodeError:  # it would have no place in a JSON file
        return "its name is not UTF-8; rename it"
    return ""


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def folder_listing(files: Iterable[Item], revision: str = "") -> Listing:
    """The visible pictures and caption files among ``files``, which are everything below a root.

    Args:
        files: In any order.
        revision: The source's own revision; by default a digest of the files.
    """
    pictures, texts = Items(), Items()
    for item in files:
        if is_picture(item.name):
            pictures.append(item)
        elif is_text(item.name):
            texts.append(item)
    pictures.sort()
    return listing_of(pictures, texts, revision)


def listing_of(pictures: Iterable[Item], texts: Iterable[Item] = (), revision: str = "") -> Listing:
    """A listing of just these files; ``revision`` is by default a digest of them."""
    packed = [files if isinstance(files, Items) else Items(files) for files in (pictures, texts)]
    by_name = ItemsByName(packed[1])
    newest = max((item.modified for item in chain(*packed)), default=0)
    return Listing(packed[0], by_name, revision or _digest(packed), newest)


def _digest(groups: Iterable[Items]) -> str:
    """SHA-256 (hex) over name, size, version and captions of every item, whatever their order."""
    digest = hashlib.sha256()
    for item in merge(*(items.by_name() for items in groups), key=lambda item: item.name):
        parts = [os.fsencode(item.name), b"%d" % item.size, item.version.encode()]
        for part in (*parts, *(caption.encode() for caption in item.captions or ())):
            digest.update(b"%d " % len(part) + part)
    return digest.hexdigest()


def as_planned(listing: Listing, revision: str, newest: int) -> Listing:
    """``listing`` as it was when ``plan`` saw it; files that came later are left out.

    Args:
        listing: What the source holds now.
        revision: The planned :attr:`Listing.revision`; empty when nothing was planned.
        newest: The planned :attr:`Listing.newest`.

    Raises:
        DatasetError: Files that were planned have been replaced or removed; names those written since.
    """
    if revision in ("", listing.revision):
        return listing
    texts = listing.texts.values()
    later = sorted(item.name for item in chain(listing.pictures, texts) if item.modified > newest)
    kept = listing_of(
        (item for item in listing.pictures if item.modified <= newest),
        (item for item in texts if item.modified <= newest),
    )
    if kept.revision == revision:
        logger.warning("%d file(s) came after the run was planned and are left out: %s", len(later), named(later))
        return replace(kept, filtered=listing.filtered)
    gone = "no file is newer, so some were removed, moved or renamed, or came with an older date"
    written = f"written since: {named(later)}" if later else gone
    raise DatasetError(f"it has changed after the run was planned ({written}); start the run again")


def named(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown


def first_line(error: Exception) -> str:
    """What ``error`` says, without the traces that libraries add; its name where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def retrying(what: str, call: Callable[[], Result], *, pause: float = 0.5) -> Result:
    """Repeat ``call`` while it raises :class:`PassingError`, with growing pauses of which a part is chance.

    Args:
        what: What is being done, for messages: "reading a.png".
        call: The request.
        pause: Seconds before the second attempt; doubled each time.

    Raises:
        DatasetError: The last attempt failed too.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except PassingError as error:
            if attempt == ATTEMPTS:
                raise DatasetError(f"{what} failed {ATTEMPTS} times, at last with: {error}; try again later") from error
            wait = min(max(pause * 2 ** (attempt - 1), error.wait), LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)
            logger.info("%s failed (%s), again in %.1f s", what, error, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def verify(item: Item, data: bytes) -> bytes:
    """``data``, when it is what was listed.

    Raises:
        PassingError: Size or checksum differ; a second read may bring the right bytes.
    """
    if item.size >= 0 and len(data) != item.size:
        raise PassingError(f"{item.name} arrived with {len(data)} bytes instead of {item.size}")
    kind, _, expected = item.checksum.partition(":")
    if kind and _checksum(kind, data) != expected:
        raise PassingError(f"{item.name} arrived damaged: its {kind} checksum is wrong")
    return data


def _checksum(kind: str, data: bytes) -> str:
    if kind == "crc32c":
        import google_crc32c

        return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
    if kind == "git":
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return hashlib.new(kind, data, usedforsecurity=False).hexdigest()
