"""Dataset repositories on the Hugging Face hub (``type: huggingface``): folders of pictures, or parquet files.

A branch or tag is resolved to a commit once, by ``plan``; everything after reads that commit. Repositories with
parquet files for the split are read as tables, others as folders.
Environment: ``HF_TOKEN`` (or the token that ``hf auth login`` stored) and ``HF_ENDPOINT``.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from kubetuner.config.sections.sources import DatasetSource
from kubetuner.errors import DatasetError
from kubetuner.sources.base import Item, Listing, PassingError, folder_listing, is_picture, retrying, verify
from kubetuner.sources.filters import FilterError, RowTest, filtered_by_name
from kubetuner.sources.hub_metadata import folder_rows
from kubetuner.sources.parquet import HubFile, ParquetPictures, folder_split, split_files
from kubetuner.sources.table import captions_of
from kubetuner.sources.web import RefusedError, Web

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_ADVICE = {
    401: "it does not exist or is private: check dataset_name, and set HF_TOKEN to a token that may read it",
    403: "the token may not read it: accept the dataset's terms on its page, or use another HF_TOKEN",
    404: "there is no such dataset or revision: check dataset_name and revision",
}

Result = TypeVar("Result")


class HubSource:
    """One commit of a dataset repository, or the part of it below ``instance_data_dir``."""

    key = "dataset_name"
    readers = 8

    def __init__(self, settings: DatasetSource) -> None:
        from huggingface_hub import HfApi, get_token

        if settings.hub is None:
            raise DatasetError(f"dataset {settings.id!r} names no repository; set {self.key}")
        self._hub = settings.hub
        self.place = settings.hub.name
        folder = settings.instance_data_dir.strip("/")
        self._prefix = f"{folder}/" if folder else ""
        self._commit = settings.revision or settings.hub.revision or "main"
        self._endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        token = get_token() or ""
        self._api = HfApi(endpoint=self._endpoint, token=token or False)
        self._web = Web(self.readers, token)
        self._test = RowTest(settings)
        self._files: dict[str, HubFile] = {}
        self._tables: ParquetPictures | None = None

    def listing(self) -> Listing:
        """See :class:`Source`."""
        from huggingface_hub import RepoFile

        info = self._asking(lambda: self._api.dataset_info(self._hub.name, revision=self._commit))
        self._commit = str(info.sha)
        entries = self._asking(
            lambda: list(
                self._api.list_repo_tree(self._hub.name, repo_type="dataset", recursive=True, revision=self._commit)
            )
        )
        files = [self._file(entry) for entry in entries if isinstance(entry, RepoFile)]
        self._files = {file.name: file for file in files if file.path.startswith(self._prefix)}
        tables = split_files(list(self._files.values()), self._hub.split)
        if not tables:
            return self._folder()
        self._tables = ParquetPictures(tables, self._hub, self._test, self._fetch)
        return self._tables.listing(self._commit)

    def _folder(self) -> Listing:
        """The pictures that are files of their own, with what metadata files say of them."""
        column = self._hub.caption_column
        columns = self._test.columns | ({column: "caption_column"} if column else {})
        rows = folder_rows(self._files.values(), columns, self._whole) if columns else {}
        if self._test.columns and not rows:
            wanted = " and ".join(self._test.columns.values())
            raise FilterError(f"it has no parquet files of pictures and no metadata file with the columns of {wanted}")
        captions = {name: captions_of(row.get(column)) for name, row in rows.items()} if column else {}
        within = folder_split([name for name in self._files if is_picture(name)], self._hub.split)
        listing = folder_listing(
            (
                Item(file.name, file.size, self._commit, checksum=file.checksum, captions=captions.get(file.name))
                for file in self._files.values()
                if file.name.startswith(within)
            ),
            self._commit,
        )
        if not self._test.active:
            return listing

        def refusal(item: Item) -> str:
            return self._test.refusal([item.name], rows.get(item.name, {}))

        return filtered_by_name(listing, refusal, self._commit)

    def read(self, item: Item) -> bytes:
        """See :class:`Source`."""
        if self._tables is not None:
            return self._tables.read(item)
        return self._whole(self._files[item.name])

    def header(self, item: Item, length: int) -> bytes:
        """See :class:`Source`."""
        if self._tables is not None:
            return self._tables.glance(item)
        if item.size <= length:
            return self.read(item)
        return self._fetch(self._files[item.name], 0, length, bytes)

    def close(self) -> None:
        """See :class:`Source`."""
        if self._tables is not None:
            self._tables.close()
        self._web.close()

    def _file(self, entry: "RepoFile") -> HubFile:
        checksum = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
        return HubFile(entry.path.removeprefix(self._prefix), entry.path, entry.size, checksum)

    def _whole(self, file: HubFile) -> bytes:
        """A file, compared with its checksum."""
        item = Item(file.name, file.size, checksum=file.checksum)
        return self._fetch(file, 0, None, lambda data: verify(item, data))

    def _fetch(self, file: HubFile, start: int, stop: int | None, check: Callable[[bytes], bytes]) -> bytes:
        """Bytes of one file at the commit."""
        url = f"{self._endpoint}/datasets/{self._hub.name}/resolve/{self._commit}/{quote(file.path)}"
        what = f"reading {file.path} of {self.place}"
        try:
            return self._web.get(what, url, start=start, stop=stop, check=check)
        except RefusedError as error:
            raise DatasetError(f"{what} failed: {_ADVICE.get(error.status, str(error))}") from error

    def _asking(self, call: Callable[[], Result]) -> Result:
        """Turn the client's exceptions into ours, and repeat what may pass; the client does not do so."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        def once() -> Result:
            try:
                return call()
            except OfflineModeIsEnabled as error:
                raise DatasetError(f"listing {self.place} failed: HF_HUB_OFFLINE is set; unset it") from error
            except HfHubHTTPError as error:
                status = error.response.status_code if error.response is not None else 0
                if status in _PASSING:
                    raise PassingError(f"status {status}") from error
                reason = _ADVICE.get(status, f"the hub refused (status {status})")
                raise DatasetError(f"listing {self.place} at {self._commit} failed: {reason}") from error
            except httpx2.TransportError as error:
                raise PassingError(type(error).__name__) from error

        return retrying(f"listing {self.place}", once)
