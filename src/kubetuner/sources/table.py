"""A table with one picture a row (``type: csv``): addresses or paths, and captions.

The table is a ``.csv``, ``.tsv`` or ``.parquet`` file. Rows of the same address are one picture with several captions.
Addresses have no versions, so a picture that a server replaces is only noticed by its content.
"""

import csv
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from kubetuner.config.sections.sources import DatasetSource, TableColumns
from kubetuner.errors import DatasetError
from kubetuner.sources.base import Item, ItemError, Listing, listing_of
from kubetuner.sources.local import file_item, read_file
from kubetuner.sources.web import Web

_NAMED = 5
Row = tuple[str, tuple[str, ...] | None]


class TableSource:
    """The rows of ``csv_file``; paths are relative to ``instance_data_dir``, else to the table's folder."""

    key = "csv_file"
    readers = 32

    def __init__(self, settings: DatasetSource) -> None:
        if settings.table is None:
            raise DatasetError(f"dataset {settings.id!r} names no table; set {self.key}")
        self._table = settings.table
        self.place = settings.table.file
        self._root = Path(settings.instance_data_dir or Path(settings.table.file).parent)
        self._addresses: dict[str, str] = {}
        self._web = Web(self.readers)

    def listing(self) -> Listing:
        """See :class:`Source`."""
        captions = self._captions()
        short = {address: _short_name(address) for address in captions}
        uses = Counter(short.values())
        items = []
        for address, texts in captions.items():
            unique = uses[short[address]] == 1
            name = short[address] if unique else f"{short[address]}~{_hash(address)[:8]}"
            self._addresses[name] = address
            items.append(self._item(name, address, texts))
        return listing_of(sorted(items, key=lambda item: item.name))

    def read(self, item: Item) -> bytes:
        """See :class:`Source`."""
        return self._get(item, None)

    def header(self, item: Item, length: int) -> bytes:
        """See :class:`Source`."""
        return self._get(item, length)

    def close(self) -> None:
        """See :class:`Source`."""
        self._web.close()

    def _captions(self) -> dict[str, tuple[str, ...] | None]:
        """Captions by address or path, in the order of the table."""
        found: dict[str, tuple[str, ...] | None] = {}
        empty, strange = [], []
        for number, (address, captions) in enumerate(_rows(Path(self._table.file), self._table), 1):
            if not address:
                empty.append(str(number))
            elif "://" in address and not address.startswith(("http://", "https://")):
                strange.append(f"{number} ({urlsplit(address).scheme})")
            else:
                both = (*(found.get(address) or ()), *(captions or ()))
                found[address] = tuple(dict.fromkeys(both)) if captions is not None or found.get(address) else None
        problems = [f"rows without {self._table.url_column}: {', '.join(empty[:_NAMED])}"] if empty else []
        problems += [f"rows that are neither http(s) nor a path: {', '.join(strange[:_NAMED])}"] if strange else []
        if problems:
            raise DatasetError(f"{self.place}: {'; '.join(problems)}; correct or remove them")
        return found

    def _item(self, name: str, address: str, captions: tuple[str, ...] | None) -> Item:
        if "://" in address:
            return Item(name, version=_hash(address), captions=captions)
        path = self._root / address
        if not path.is_file():
            return Item(name, version="missing", captions=captions)
        file = file_item(self._root, address)
        return Item(name, file.size, file.version, file.modified, captions=captions)

    def _get(self, item: Item, length: int | None) -> bytes:
        address = self._addresses[item.name]
        if "://" not in address:
            file = Item(address, item.size, item.version)
            return read_file(self._root, file, -1 if length is None else length)
        try:
            return self._web.get(f"fetching {item.name}", address, stop=length)
        except DatasetError as error:
            # One dead server among many is no reason to stop; the share of skipped pictures decides.
            raise ItemError(f"cannot be fetched ({error})") from error


def _short_name(address: str) -> str:
    """The address without scheme, credentials and query, which may be secret; a path as it is."""
    if "://" not in address:
        return address.lstrip("/")
    # Not urlsplit, which refuses some addresses: whoever asks for the picture tells of those.
    host, slash, path = re.split("[?#]", address.partition("://")[2])[0].partition("/")
    return f"{host.rpartition('@')[2]}{slash}{path}"


def _hash(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()


def _rows(path: Path, columns: TableColumns) -> Iterator[Row]:
    """Address and captions of every row.

    Raises:
        DatasetError: The table cannot be read or lacks a column.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path, columns)
        else:
            yield from _csv_rows(path, columns)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror or error}); check csv_file") from error


def _csv_rows(path: Path, columns: TableColumns) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 1 << 30))  # captions by language models are long
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            _require(path, columns, list(reader.fieldnames or ()))
            for row in reader:
                text = (row.get(columns.caption_column) or "").strip()
                yield (row.get(columns.url_column) or "").strip(), (text,) if columns.caption_column else None
        except (csv.Error, UnicodeDecodeError) as error:
            raise DatasetError(f"{path} is damaged after line {reader.line_num} ({error}); check csv_file") from error


def _parquet_rows(path: Path, columns: TableColumns) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            _require(path, columns, table.schema_arrow.names)
            wanted = [name for name in (columns.url_column, columns.caption_column) if name]
            for batch in table.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    yield str(row[columns.url_column] or "").strip(), captions_of(row.get(columns.caption_column))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is no readable parquet file ({error}); check csv_file") from error


def captions_of(cell: object) -> tuple[str, ...] | None:
    """The captions in a cell of a parquet table: a string, a list of strings, or none."""
    if cell is None:
        return None
    texts = [str(text).strip() for text in cell if text is not None] if isinstance(cell, list) else [str(cell).strip()]
    return tuple(dict.fromkeys(texts)) or ("",)


def _require(path: Path, columns: TableColumns, known: list[str]) -> None:
    missing = [
        f"{name!r} ({key})"
        for name, key in ((columns.url_column, "csv_url_column"), (columns.caption_column, "csv_caption_column"))
        if name and name not in known
    ]
    if missing:
        raise DatasetError(f"{path} has no column {' and no column '.join(missing)}; it has {', '.join(known)}")
