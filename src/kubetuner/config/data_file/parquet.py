"""``caption_strategy: parquet``: the ``parquet`` object of a picture entry, checked against its other keys."""

import re
from collections.abc import Mapping

from kubetuner.config.data_file.keys import CAPTION_TABLE_SCHEMA
from kubetuner.config.keys import Values, read
from kubetuner.config.sections.sources import CaptionTable
from kubetuner.errors import Problem

_TYPES = ("local", "gcs", "aws")
_GCS_ADDRESS = re.compile(r"gs://[a-z0-9][\w.-]+/.+")


def read_caption_table(
    values: Values, strategy: str, where: str, problems: list[Problem], notes: list[str]
) -> CaptionTable | None:
    """The table that an entry's captions are in; ``None`` where they are elsewhere.

    Args:
        values: The entry's values.
        strategy: Its ``caption_strategy``, defaults applied.
        where: File and index for messages.
        problems: Receives one entry per fault.
        notes: Receives what was accepted without effect.
    """
    kind = values.text("type", "local")
    if strategy != "parquet":
        _refuse_unused(values, strategy, where, problems)
        return None
    if kind not in _TYPES:
        own = f"captions of type {kind} are in its own column"
        message = f"is parquet, but {own}; set it to {kind} and name the column."
        problems.append(Problem(f"{where}.caption_strategy", message))
        return None
    given = values.json("parquet")
    if not isinstance(given, Mapping):
        got = "missing" if given is None else f"a {type(given).__name__}"
        message = f'is {got}; caption_strategy parquet needs an object such as {{"path": "captions.parquet"}}.'
        problems.append(Problem(f"{where}.parquet", message))
        return None
    found = read(given, CAPTION_TABLE_SCHEMA, f"{where}.parquet", problems)
    notes.extend(f"{where}.parquet.{note}" for note in found.notes)
    if (fault := _path_fault(found.text("path"), kind)) and not _told(f"{where}.parquet.path", problems):
        problems.append(Problem(f"{where}.parquet.path", fault))
    columns = {"caption_columns": found.texts("caption_column")} if found.texts("caption_column") else {}
    names = ("path", "filename_column", "fallback_caption_column", "identifier_includes_extension")
    return CaptionTable.model_validate({"path": "", **found.pick(*names), **columns})


def _refuse_unused(values: Values, strategy: str, where: str, problems: list[Problem]) -> None:
    if values.text("metadata_backend") == "parquet":
        message = (
            f"is parquet, which with caption_strategy {strategy} would only give sizes, and these are read from the "
            "pictures; remove it and the parquet object, or set caption_strategy to parquet."
        )
        problems.append(Problem(f"{where}.metadata_backend", message))
    elif "parquet" in values:
        message = f"would not be used with caption_strategy {strategy}; set that to parquet, or remove the object."
        problems.append(Problem(f"{where}.parquet", message))


def _path_fault(path: str, kind: str) -> str:
    if not path.lower().endswith(".parquet"):
        return f"is {path!r}; expected a .parquet file."
    if kind == "gcs" and "://" in path and not _GCS_ADDRESS.fullmatch(path):
        return f"is {path!r}; expected gs://bucket/name, or a name in the bucket of the pictures."
    if kind == "aws" and ("://" in path or path.startswith("/")):
        return f"is {path!r}; expected a name in the bucket of the pictures, without a leading slash."
    if kind == "local" and "://" in path:
        return f"is {path!r}; expected a file beside which the pictures are, as type is local."
    return ""


def _told(place: str, problems: list[Problem]) -> bool:
    return any(problem.where == place for problem in problems)
