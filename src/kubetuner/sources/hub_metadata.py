"""Captions of a hub folder: ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` beside the pictures.

Its column ``file_name`` holds paths relative to its own folder, as the hub's image folders have it.
"""

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping

from kubetuner.errors import DatasetError
from kubetuner.sources.parquet import METADATA_TABLE, HubFile
from kubetuner.sources.table import captions_of

_NAMES = ("metadata.jsonl", "metadata.csv", METADATA_TABLE)
_FILE_COLUMN = "file_name"


def folder_captions(
    files: Iterable[HubFile], column: str, read: Callable[[HubFile], bytes]
) -> dict[str, tuple[str, ...]]:
    """Captions by the name of the picture, out of every metadata file among ``files``.

    Raises:
        DatasetError: A metadata file is damaged or lacks a column.
    """
    found: dict[str, tuple[str, ...]] = {}
    for file in files:
        folder, slash, base = file.name.rpartition("/")
        if base not in _NAMES:
            continue
        for number, row in enumerate(_rows(file, read(file)), 1):
            if missing := [repr(name) for name in (_FILE_COLUMN, column) if name not in row]:
                known = ", ".join(map(str, row))
                raise DatasetError(f"{file.path}: row {number} has no column {' and '.join(missing)}; it has {known}")
            captions = captions_of(row[column])
            if captions is not None:
                found[f"{folder}{slash}{posixpath.normpath(str(row[_FILE_COLUMN]))}"] = captions
    return found


def _rows(file: HubFile, data: bytes) -> Iterator[Mapping[str, object]]:
    if file.name.endswith(".parquet"):
        yield from _table_rows(file, data)
        return
    try:
        text = data.decode("utf-8-sig")
        if file.name.endswith(".csv"):
            yield from csv.DictReader(io.StringIO(text, newline=""))
            return
        for line in text.split("\n"):  # not splitlines: captions may hold other separators
            row = json.loads(line) if line.strip() else None
            if isinstance(row, dict):
                yield row
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        raise DatasetError(f"{file.path} is damaged ({error})") from error


def _table_rows(file: HubFile, data: bytes) -> Iterator[Mapping[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(pa.BufferReader(data)) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DatasetError(f"{file.path} is damaged ({error})") from error
