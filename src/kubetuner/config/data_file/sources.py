"""Where an entry of the data file keeps its pictures: its storage keys to the fields of :class:`DatasetSource`."""

import re
from collections.abc import Mapping

from kubetuner.config.data_file.filters import read_composite, read_filter
from kubetuner.config.keys import Values, plain_name
from kubetuner.errors import Problem

_OWN_KEYS = {
    "local": (),
    "gcs": (),
    "csv": ("csv_file", "csv_url_column", "csv_caption_column"),
    "huggingface": ("dataset_name", "revision", "split", "image_column", "caption_column"),
    "aws": ("aws_bucket_name", "aws_endpoint_url", "aws_region_name"),
}
# The key that holds captions, for the types whose name is also a caption strategy.
_CAPTION_KEYS = {"csv": "csv_caption_column", "huggingface": "caption_column"}
_TABLES = (".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_GCS_ADDRESS = re.compile(r"gs://[a-z0-9][\w.-]+(/.*)?")


def flatten_hub(entry: Mapping[str, object], where: str, problems: list[Problem]) -> dict[str, object]:
    """``entry`` with the keys of its ``huggingface`` object beside the others, where SimpleTuner takes them too."""
    flat: dict[str, object] = {}
    for written, value in entry.items():
        if plain_name(written) != "huggingface" or value is None:
            flat[written] = value
        elif not isinstance(value, Mapping):
            problems.append(Problem(f"{where}.{written}", f"is a {type(value).__name__}; expected an object."))
        else:
            for name, inner in value.items():
                if name in entry:
                    problems.append(Problem(f"{where}.{written}.{name}", "is given twice; keep one of them."))
                else:
                    flat[str(name)] = inner
    return flat


def read_storage(values: Values, run: Values, where: str, problems: list[Problem]) -> dict[str, object]:
    """Fields of ``DatasetSource`` that say where pictures and captions are; faults go to ``problems``.

    Args:
        values: The entry's keys.
        run: Values of ``config.json``, whose ``caption_strategy`` is the entries' default.
        where: File and index for messages.
        problems: Receives one entry per fault.
    """
    kind = values.text("type", "local")
    for other, names in _OWN_KEYS.items():
        for name in names if other != kind else ():
            if name in values:
                problems.append(Problem(f"{where}.{name}", f"has no effect with type {kind}; remove it."))
    _check_place(kind, values, where, problems)
    strategy = values.text("caption_strategy") or run.text("caption_strategy")
    own = _CAPTION_KEYS.get(kind, "")
    if not strategy:
        strategy = kind if own and own in values else "filename"
    _check_strategy(strategy, kind, values, where, problems)
    fields: dict[str, object] = {"type": kind, "caption_strategy": strategy, **values.pick("instance_data_dir")}
    fields |= read_filter(values, where, problems)
    fields["composite"] = read_composite(values, where, problems)
    if kind == "csv" and "csv_file" in values:
        fields["table"] = _renamed(
            values, {"csv_file": "file", "csv_url_column": "url_column", "csv_caption_column": "caption_column"}
        )
    elif kind == "huggingface" and "dataset_name" in values:
        own_fields = {"dataset_name": "name"} | {name: name for name in _OWN_KEYS[kind][1:]}
        fields["hub"] = _renamed(values, own_fields)
    elif kind == "aws" and "aws_bucket_name" in values:
        fields["bucket"] = _renamed(
            values, {"aws_bucket_name": "name", "aws_endpoint_url": "endpoint_url", "aws_region_name": "region"}
        )
    return fields


def _renamed(values: Values, names: Mapping[str, str]) -> dict[str, object]:
    return {field: values.get(key) for key, field in names.items() if key in values}


def _check_place(kind: str, values: Values, where: str, problems: list[Problem]) -> None:
    folder = values.text("instance_data_dir")

    def fault(key: str, message: str) -> None:
        if not any(problem.where == f"{where}.{key}" for problem in problems):  # a value of a wrong type is enough
            problems.append(Problem(f"{where}.{key}", message))

    if kind == "local" and not folder:
        fault("instance_data_dir", "is missing; expected the folder of the pictures.")
    elif kind == "local" and "://" in folder:
        scheme = folder.partition("://")[0]
        fitting = {"gs": "gcs", "s3": "aws", "hf": "huggingface"}.get(scheme, "gcs, huggingface, csv or aws")
        fault("instance_data_dir", f"is an address ({scheme}://) and type is local; set type to {fitting}.")
    elif kind == "gcs" and not _GCS_ADDRESS.fullmatch(folder):
        fault("instance_data_dir", f"is {folder!r}; expected gs://bucket/prefix.")
    elif kind in ("huggingface", "aws") and (folder.startswith("/") or "://" in folder):
        inside = "repository" if kind == "huggingface" else "bucket"
        fault("instance_data_dir", f"is {folder!r}; expected a folder inside the {inside}, without a leading slash.")
    if kind == "csv" and not values.text("csv_file").lower().endswith(_TABLES):
        fault("csv_file", f"is {values.text('csv_file')!r}; expected a {', '.join(_TABLES)} file.")
    if kind == "huggingface" and not _HUB_NAME.fullmatch(values.text("dataset_name")):
        fault("dataset_name", f"is {values.text('dataset_name')!r}; expected namespace/name.")
    if kind == "aws" and not values.text("aws_bucket_name"):
        fault("aws_bucket_name", "is missing; expected the name of the bucket.")


def _check_strategy(strategy: str, kind: str, values: Values, where: str, problems: list[Problem]) -> None:
    key = f"{where}.caption_strategy"
    column = _CAPTION_KEYS.get(kind, "")
    if strategy in _CAPTION_KEYS and strategy != kind:
        problems.append(Problem(key, f"is {strategy}, which needs type {strategy}; type is {kind}."))
    elif strategy == kind and column not in values:
        problems.append(Problem(f"{where}.{column}", f"is missing; caption_strategy {strategy} reads it."))
    elif column and column in values and strategy != kind:
        message = f"would not be used with caption_strategy {strategy}; set that to {kind}, or remove the column."
        problems.append(Problem(f"{where}.{column}", message))
    if strategy == "textfile" and kind == "csv":
        problems.append(Problem(key, "is textfile, but a table has no files beside its pictures; use csv."))
