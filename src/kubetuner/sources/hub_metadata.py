"""What a hub folder says of its pictures: ``metadata.jsonl`` or ``metadata.csv`` beside them.

Its column ``file_name`` holds paths relative to its own folder, as the hub's image folders have it.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping

from kubetuner.errors import DatasetError
from kubetuner.sources.parquet import HubFile

_NAMES = ("metadata.jsonl", "metadata.csv")
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
            found[f"{folder}{slash}{row[_FILE_COLUMN]}"] = {name: row[name] for name in columns}
    return found


def _rows(file: HubFile, data: bytes) -> Iterator[Mapping[str, object]]:
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
