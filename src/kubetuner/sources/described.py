"""Pictures of which a parquet file tells captions or sizes (``metadata_backend: parquet``), in any storage of files.

The table is read whole with each listing and counts as one of its files, so that a table that changes after the plan
is found out like a picture that does.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Protocol, TypeVar, runtime_checkable

from kubetuner.config.sections.sources import MetadataTable
from kubetuner.errors import DatasetError
from kubetuner.sources.base import PICTURE_EXTENSIONS, Item, Listing, Source, listing_of
from kubetuner.sources.relisted import Relisted
from kubetuner.sources.table import captions_of

ToldT = TypeVar("ToldT")


@runtime_checkable
class HoldsTables(Source, Protocol):
    """A source whose storage may hold a table anywhere, beside the pictures or not."""

    def read_table(self, path: str) -> tuple[Item, bytes]:
        """The newest bytes of the file ``path``, and what pins them.

        Raises:
            DatasetError: It cannot be read.
        """


class Described(Relisted):
    """``source`` with the captions and sizes of ``table``."""

    def __init__(self, source: HoldsTables, table: MetadataTable) -> None:
        super().__init__(source)
        self._tables, self._table = source, table

    def listing(self) -> Listing:
        """See :class:`Source`; pictures that the table does not know have no captions and no size."""
        found = self._source.listing()
        item, data = self._tables.read_table(self._table.path)
        names = identifiers(found.pictures, self._table)
        captions = read_captions(data, self._table)
        sizes = read_sizes(data, self._table)
        pictures = [
            replace(
                picture,
                captions=_of(captions, names[picture.name]) if self._table.caption_columns else picture.captions,
                pixels=_of(sizes, names[picture.name]),
            )
            for picture in found.pictures
        ]
        return listing_of(pictures, (*found.texts.values(), item))


def identifiers(pictures: Sequence[Item], table: MetadataTable) -> dict[str, tuple[str, ...]]:
    """What each picture may be called in the table, by its name: its path and, where no other has it, its last part."""
    paths = {picture.name: _identifier(picture.name, table) for picture in pictures}
    uses = Counter(path.rpartition("/")[2] for path in paths.values())
    return {
        name: (path, last) if uses[last := path.rpartition("/")[2]] == 1 else (path,) for name, path in paths.items()
    }


def read_captions(data: bytes, table: MetadataTable) -> dict[str, tuple[str, ...]]:
    """Captions by identifier; those of several rows, or columns, are alternatives. Rows without any are left out.

    Raises:
        DatasetError: ``data`` is no parquet file or lacks a column.
    """
    if not table.caption_columns:
        return {}
    columns = [*table.caption_columns]
    columns += [table.fallback_caption_column] if table.fallback_caption_column else []
    found: dict[str, list[str]] = defaultdict(list)
    for name, row in _rows(data, table, columns):
        found[name] += _captions(row, table)
    return {name: tuple(dict.fromkeys(texts)) for name, texts in found.items() if texts}


def read_sizes(data: bytes, table: MetadataTable) -> dict[str, tuple[int, int]]:
    """(width, height) by identifier, of the rows that hold two positive whole numbers; the last of several rows counts.

    Raises:
        DatasetError: ``data`` is no parquet file or lacks a column.
    """
    if not table.width_column:
        return {}
    found: dict[str, tuple[int, int]] = {}
    for name, row in _rows(data, table, [table.width_column, table.height_column]):
        width, height = row[table.width_column], row[table.height_column]
        if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
            found[name] = width, height
    return found


def _rows(data: bytes, table: MetadataTable, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """Identifier and ``columns`` of every row that has an identifier."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [table.filename_column, *columns]
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            known = file.schema_arrow.names
            if missing := [repr(name) for name in columns if name not in known]:
                lack = " and no column ".join(missing)
                raise DatasetError(f"{table.path} has no column {lack}; it has {', '.join(known)}")
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                for row in batch.to_pylist():
                    if row[table.filename_column] is not None:
                        yield str(row[table.filename_column]).strip(), row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DatasetError(f"{table.path} is no readable parquet file ({error}); check parquet.path") from error


def _captions(row: dict[str, object], table: MetadataTable) -> list[str]:
    own = [text for name in table.caption_columns for text in captions_of(row[name]) or ()]
    if not any(own) and table.fallback_caption_column:
        own = [text for text in captions_of(row[table.fallback_caption_column]) or () if text] or own
    # Beside another caption an empty one is a gap and not an alternative.
    return [text for text in own if text] or own[:1]


def _identifier(name: str, table: MetadataTable) -> str:
    path = PurePosixPath(name)
    stripped = not table.identifier_includes_extension and path.suffix.lower() in PICTURE_EXTENSIONS
    return str(path.with_suffix("")) if stripped else name


def _of(told: Mapping[str, ToldT], names: Sequence[str]) -> ToldT | None:
    return next((told[name] for name in names if name in told), None)
