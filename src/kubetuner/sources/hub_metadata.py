"""Captions of a hub folder: ``metadata.jsonl`` or ``metadata.csv`` beside the pictures.

Its column ``file_name`` holds paths relative to its own folder, as the hub's image folders have it.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping

from kubetuner.errors import DatasetError
from kubetuner.sources.parquet import HubFile
from kubetuner.sources.table import captions_of

_NAMES = ("metadata.jsonl", "metadata.csv")
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
                found[f"{folder}{slash}{row[_FILE_COLUMN]}"] = captions
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
