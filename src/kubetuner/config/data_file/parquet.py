"""``metadata_backend: parquet``: the ``parquet`` object of a picture entry, checked against its other keys."""

import re
from collections.abc import Mapping

from kubetuner.config.data_file.keys import METADATA_TABLE_SCHEMA
from kubetuner.config.keys import Values, read
from kubetuner.config.sections.sources import MetadataTable
from kubetuner.errors import Problem

_TYPES = ("local", "gcs", "aws")
_GCS_ADDRESS = re.compile(r"gs://[a-z0-9][\w.-]+/.+")


def read_metadata_table(values: Values, strategy: str, where: str, problems: list[Problem]) -> MetadataTable | None:
    """The table that tells of an entry's pictures; ``None`` where there is none.

    Args:
        values: The entry's values.
        strategy: Its ``caption_strategy``, defaults applied.
        where: File and index for messages.
        problems: Receives one entry per fault.
    """
    kind, captions = values.text("type", "local"), strategy == "parquet"
    if not captions and values.text("metadata_backend") != "parquet":
        if "parquet" in values:
            message = "would not be used; set caption_strategy or metadata_backend to parquet, or remove the object."
            problems.append(Problem(f"{where}.parquet", message))
        return None
    key = "caption_strategy" if captions else "metadata_backend"
    if kind not in _TYPES:
        own = f"captions and sizes of type {kind} are in its own columns"
        problems.append(Problem(f"{where}.{key}", f"is parquet, but {own}; {_instead(key, kind)}."))
        return None
    given = values.json("parquet")
    if not isinstance(given, Mapping):
        got = "missing" if given is None else f"a {type(given).__name__}"
        message = f'is {got}; {key} parquet needs an object such as {{"path": "captions.parquet"}}.'
        problems.append(Problem(f"{where}.parquet", message))
        return None
    found = read(given, METADATA_TABLE_SCHEMA, f"{where}.parquet", problems)
    if (fault := _path_fault(found.text("path"), kind)) and not _told(f"{where}.parquet.path", problems):
        problems.append(Problem(f"{where}.parquet.path", fault))
    _check_columns(found, captions, strategy, f"{where}.parquet", problems)
    names = ("path", "filename_column", "identifier_includes_extension", "width_column", "height_column")
    fields: dict[str, object] = {"path": "", **found.pick(*names)}
    if captions:
        fields |= {"caption_columns": found.texts("caption_column")} if found.texts("caption_column") else {}
        fields |= found.pick("fallback_caption_column")
    else:
        fields["caption_columns"] = ()
    return MetadataTable.model_validate(fields)


def _instead(key: str, kind: str) -> str:
    return f"set it to {kind} and name the column" if key == "caption_strategy" else "remove it"


def _check_columns(found: Values, captions: bool, strategy: str, where: str, problems: list[Problem]) -> None:
    sizes = [name for name in ("width_column", "height_column") if name in found]
    if len(sizes) == 1:
        problems.append(Problem(f"{where}.{sizes[0]}", "is one of width_column and height_column; name both or none."))
    if captions:
        return
    if not sizes:
        message = f"tells neither captions (caption_strategy is {strategy}) nor sizes (width_column, height_column)."
        problems.append(Problem(where, message))
    unused = f"would not be used with caption_strategy {strategy}; set that to parquet, or remove it."
    names = ("caption_column", "fallback_caption_column")
    problems.extend(Problem(f"{where}.{name}", unused) for name in names if name in found)


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
