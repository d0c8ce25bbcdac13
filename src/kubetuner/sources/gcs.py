"""Pictures in a Google Cloud Storage bucket (``type: gcs``, ``instance_data_dir: gs://bucket/prefix``)."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kubetuner.config.sections.sources import DatasetSource
from kubetuner.errors import DatasetError
from kubetuner.google_storage import connect, list_objects, request_options, split_address
from kubetuner.sources.base import (
    Item,
    Listing,
    PassingError,
    first_line,
    folder_listing,
    is_picture,
    is_text,
    retrying,
    verify,
)

if TYPE_CHECKING:
    from google.cloud.storage import Blob

CHUNK_BYTES = 32 << 20
"""Larger objects are read in parts of this size, several at once."""
_FIELDS = "name,size,generation,crc32c,contentEncoding,timeCreated"

Result = TypeVar("Result")


class GcsSource:
    """The objects below a prefix; each is read at the generation that was listed."""

    key = "instance_data_dir"
    # Small objects take one answer's delay each, whatever their size: bench/README.md has rates by number of readers.
    readers = 24

    def __init__(self, settings: DatasetSource) -> None:
        parts = split_address(settings.instance_data_dir)
        if parts is None:
            raise DatasetError(
                f"{settings.instance_data_dir!r} is no address like gs://bucket/prefix; check {self.key}"
            )
        self.place = settings.instance_data_dir
        self._client = connect("read_only", self.readers, DatasetError)
        self._bucket, self._prefix = self._client.bucket(parts[0]), parts[1]

    def listing(self) -> Listing:
        """See :class:`Source`."""
        return self._calling(f"listing {self.place}", lambda: folder_listing(self._items()))

    def read(self, item: Item) -> bytes:
        """See :class:`Source`."""

        def fetch() -> bytes:
            blob = self._blob(item)
            if item.size > CHUNK_BYTES:
                return verify(item, _in_chunks(blob))
            return verify(item, blob.download_as_bytes(checksum="crc32c", **request_options()))

        return self._calling(f"reading {self._address(item)}", fetch)

    def header(self, item: Item, length: int) -> bytes:
        """See :class:`Source`."""
        if 0 <= item.size <= length:
            return self.read(item)

        def fetch() -> bytes:
            return bytes(
                self._blob(item).download_as_bytes(start=0, end=length - 1, checksum=None, **request_options())
            )

        return self._calling(f"reading the start of {self._address(item)}", fetch)

    def read_table(self, path: str) -> tuple[Item, bytes]:
        """See :class:`~kubetuner.sources.captioned.HoldsTables`."""
        parts = split_address(path)
        bucket = self._client.bucket(parts[0]) if parts else self._bucket
        name = parts[1].removesuffix("/") if parts else path

        def fetch() -> tuple[Item, bytes]:
            blob = bucket.get_blob(name, **request_options())
            if blob is None:
                raise DatasetError(f"there is no gs://{bucket.name}/{name}; check parquet.path")
            item = Item(path, blob.size, str(blob.generation), _written(blob))
            options = {"checksum": "crc32c", "if_generation_match": blob.generation, **request_options()}
            return item, blob.download_as_bytes(**options)

        return self._calling(f"reading gs://{bucket.name}/{name}", fetch)

    def close(self) -> None:
        """See :class:`Source`."""
        self._client.close()

    def _items(self) -> Iterator[Item]:
        for blob in list_objects(self._bucket, self._prefix, _FIELDS):
            name = blob.name.removeprefix(self._prefix)
            if not (is_picture(name) or is_text(name)):
                continue
            # Objects that are stored compressed arrive unpacked: neither size nor checksum is that of the bytes.
            packed = blob.content_encoding == "gzip"
            yield Item(
                name,
                size=-1 if packed else blob.size,
                version=str(blob.generation),
                modified=_written(blob),
                checksum=f"crc32c:{blob.crc32c}" if blob.crc32c and not packed else "",
            )

    def _blob(self, item: Item) -> "Blob":
        return self._bucket.blob(self._prefix + item.name, generation=int(item.version))

    def _address(self, item: Item) -> str:
        return f"gs://{self._bucket.name}/{self._prefix}{item.name}"

    def _calling(self, what: str, call: Callable[[], Result]) -> Result:
        """Turn Google's exceptions into ours, and repeat what may pass."""
        from google.api_core.exceptions import ClientError, GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption
        from requests.exceptions import RequestException

        def once() -> Result:
            try:
                return call()
            except (DataCorruption, RequestException) as error:
                raise PassingError(first_line(error)) from error
            except ClientError as error:
                raise DatasetError(f"{what} failed: {_advice(what, int(error.code or 0))}") from error
            except (GoogleAPIError, GoogleAuthError) as error:
                raise DatasetError(f"{what} failed: {first_line(error)}; try again later") from error

        return retrying(what, once)


def _written(blob: "Blob") -> int:
    """When an object was written, in nanoseconds since 1970."""
    written = blob.time_created
    return int(written.timestamp() * 1_000_000) * 1000 if written else 0


def _advice(what: str, status: int) -> str:
    if status == 404 and what.startswith("listing"):
        return "there is no such bucket (404); check instance_data_dir"
    if status in (404, 412):
        return "it was replaced or removed while the step ran; run it again"
    if status in (401, 403):
        return (
            f"access is denied ({status}); give the pod's service account the role Storage Object Viewer on the "
            "bucket, or set GOOGLE_APPLICATION_CREDENTIALS"
        )
    return f"the request was refused ({status})"


def _in_chunks(blob: "Blob") -> bytes:
    """A large object by Google's transfer manager: parts on several threads."""
    from google.cloud.storage import transfer_manager

    with tempfile.TemporaryDirectory(prefix="kubetuner-gcs-") as folder:
        path = Path(folder) / "object"
        transfer_manager.download_chunks_concurrently(
            blob,
            str(path),
            chunk_size=CHUNK_BYTES,
            download_kwargs=request_options(),
            worker_type=transfer_manager.THREAD,
            crc32c_checksum=True,
        )
        return path.read_bytes()
