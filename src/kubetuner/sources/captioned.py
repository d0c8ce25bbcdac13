"""Pictures whose captions are in one parquet file (``caption_strategy: parquet``), from any storage of files.

The table is read whole with each listing and counts as one of its files, so that a table that changes after the plan
is found out like a picture that does.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Protocol, runtime_checkable

from kubetuner.config.sections.sources import CaptionTable
from kubetuner.errors import DatasetError
from kubetuner.sources.base import PICTURE_EXTENSIONS, Item, Listing, Source, listing_of
from kubetuner.sources.table import captions_of


@runtime_checkable
class HoldsTables(Source, Protocol):
    """A source whose storage may hold a table anywhere, beside the pictures or not."""

    def read_table(self, path: str) -> tuple[Item, bytes]:
        """The newest bytes of the file ``path``, and what pins them.

        Raises:
            DatasetError: It cannot be read.
        """


class Captioned:
    """``source`` with the captions of ``table``."""

    def __init__(self, source: HoldsTables, table: CaptionTable) -> None:
        self._source, self._table = source, table
        self.place, self.key, self.readers = source.place, source.key, source.readers

    def listing(self) -> Listing:
        """See :class:`Source`; pictures that the table does not know have no captions."""
        found = self._source.listing()
        item, data = self._source.read_table(self._table.path)
        captions = read_captions(data, self._table)
        names = identifiers(found.pictures, self._table)
        pictures = [replace(picture, captions=_of(captions, names[picture.name])) for picture in found.pictures]
        return listing_of(pictures, (*found.texts.values(), item))

    def read(self, item: Item) -> bytes:
        """See :class:`Source`."""
        return self._source.read(item)

    def header(self, item: Item, length: int) -> bytes:
        """See :class:`Source`."""
        return self._source.header(item, length)

    def close(self) -> None:
        """See :class:`Source`."""
        self._source.close()


def identifiers(pictures: Sequence[Item], table: CaptionTable) -> dict[str, tuple[str, ...]]:
    """What each picture may be called in the table, by its name: its path and, where no other has it, its last part."""
    paths = {picture.name: _identifier(picture.name, table) for picture in pictures}
    uses = Counter(path.rpartition("/")[2] for path in paths.values())
    return {
        name: (path, last) if uses[last := path.rpartition("/")[2]] == 1 else (path,) for name, path in paths.items()
    }


def read_captions(data: bytes, table: CaptionTable) -> dict[str, tuple[str, ...]]:
    """Captions by identifier; those of several rows, or columns, are alternatives. Rows without any are left out.

    Raises:
        DatasetError: ``data`` is no parquet file or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [table.filename_column, *table.caption_columns]
    columns += [table.fallback_caption_column] if table.fallback_caption_column else []
    found: dict[str, list[str]] = defaultdict(list)
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            known = file.schema_arrow.names
            if missing := [repr(name) for name in columns if name not in known]:
                lack = " and no column ".join(missing)
                raise DatasetError(f"{table.path} has no column {lack}; it has {', '.join(known)}")
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                for row in batch.to_pylist():
                    if row[table.filename_column] is not None:
                        found[str(row[table.filename_column]).strip()] += _captions(row, table)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DatasetError(f"{table.path} is no readable parquet file ({error}); check parquet.path") from error
    return {name: tuple(dict.fromkeys(texts)) for name, texts in found.items() if texts}


def _captions(row: dict[str, object], table: CaptionTable) -> list[str]:
    own = [text for name in table.caption_columns for text in captions_of(row[name]) or ()]
    if not any(own) and table.fallback_caption_column:
        own = [text for text in captions_of(row[table.fallback_caption_column]) or () if text] or own
    # Beside another caption an empty one is a gap and not an alternative.
    return [text for text in own if text] or own[:1]


def _identifier(name: str, table: CaptionTable) -> str:
    path = PurePosixPath(name)
    stripped = not table.identifier_includes_extension and path.suffix.lower() in PICTURE_EXTENSIONS
    return str(path.with_suffix("")) if stripped else name


def _of(captions: dict[str, tuple[str, ...]], names: Sequence[str]) -> tuple[str, ...] | None:
    return next((captions[name] for name in names if name in captions), None)
