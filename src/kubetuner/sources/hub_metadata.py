"""What a hub folder says of its pictures: ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` beside them.

Its column ``file_name`` holds paths relative to its own folder, as the hub's image folders have it.
"""

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping

from kubetuner.errors import DatasetError
from kubetuner.sources.parquet import METADATA_TABLE, HubFile

_NAMES = ("metadata.jsonl", "metadata.csv", METADATA_TABLE)
_FILE_COLUMN = "file_name"

Row = dict[str, object]


def folder_rows(
    files: Iterable[HubFile], columns: Mapping[str, str], read: Callable[[HubFile], bytes]
) -> dict[str, Row]:
    """The ``columns`` of every row in the metadata files among ``files``, by the name of the row's picture.

    Args:
        files: Everything in the folder.
        columns: The columns that every row must have, and the key that wants each.
        read: Reads a file whole.

    Raises:
        DatasetError: A metadata file is damaged or lacks a column.
    """
    found: dict[str, Row] = {}
    for file in files:
        folder, slash, base = file.name.rpartition("/")
        if base not in _NAMES:
            continue
        for number, row in enumerate(_rows(file, read(file)), 1):
            wanted = {_FILE_COLUMN: "the picture's path", **columns}
            if missing := [f"{name!r} ({key})" for name, key in wanted.items() if name not in row]:
                known, lack = ", ".join(map(str, row)), " and no column ".join(missing)
                raise DatasetError(f"{file.path}: row {number} has no column {lack}; it has {known}")
            picture = posixpath.normpath(str(row[_FILE_COLUMN]))
            found[f"{folder}{slash}{picture}"] = {name: row[name] for name in columns}
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
