"""From a dataset's settings to its source: the only place that knows the kinds."""

from collections.abc import Callable
from pathlib import Path

from kubetuner.config.sections.sources import DatasetSource
from kubetuner.errors import DatasetError
from kubetuner.sources.base import Source


def open_source(settings: DatasetSource) -> Source:
    """The source of ``settings``; close it when done.

    Raises:
        DatasetError: A library or credentials are missing, or the address is malformed.
    """
    source = _KINDS[settings.type](settings)
    if settings.metadata_table is not None:
        from kubetuner.sources.described import Described, HoldsTables

        if not isinstance(source, HoldsTables):
            source.close()
            raise DatasetError(f"metadata_backend parquet is not possible with type {settings.type}")
        source = Described(source, settings.metadata_table)
    if settings.paths is None or settings.type == "huggingface":  # a hub's rows are filtered by whoever reads them
        return source
    from kubetuner.sources.filters import FilteredByName

    return FilteredByName(source, settings.paths)


def located(settings: DatasetSource, cwd: Path) -> DatasetSource:
    """``settings`` with local paths made absolute; they are relative to ``cwd``."""

    def absolute(path: str) -> str:
        return str((cwd / path).expanduser().resolve())

    if settings.type == "local":
        beside = settings.metadata_table
        if beside is not None:
            beside = beside.model_copy(update={"path": absolute(beside.path)})
        return settings.model_copy(
            update={"instance_data_dir": absolute(settings.instance_data_dir), "metadata_table": beside}
        )
    if settings.table is not None:
        table = settings.table.model_copy(update={"file": absolute(settings.table.file)})
        root = absolute(settings.instance_data_dir or str(Path(settings.table.file).parent))
        return settings.model_copy(update={"table": table, "instance_data_dir": root})
    return settings


def _local(settings: DatasetSource) -> Source:
    from kubetuner.sources.local import LocalSource

    return LocalSource(settings)


def _gcs(settings: DatasetSource) -> Source:
    from kubetuner.sources.gcs import GcsSource

    return GcsSource(settings)


def _table(settings: DatasetSource) -> Source:
    from kubetuner.sources.table import TableSource

    return TableSource(settings)


def _hub(settings: DatasetSource) -> Source:
    from kubetuner.sources.hub import HubSource

    return HubSource(settings)


def _s3(settings: DatasetSource) -> Source:
    from kubetuner.sources.s3 import S3Source

    return S3Source(settings)


_KINDS: dict[str, Callable[[DatasetSource], Source]] = {
    "local": _local,
    "gcs": _gcs,
    "huggingface": _hub,
    "csv": _table,
    "aws": _s3,
}
