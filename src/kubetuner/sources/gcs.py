"""Pictures in a Google Cloud Storage bucket (``type: gcs``, ``instance_data_dir: gs://bucket/prefix``).

Credentials are Google's usual ones: workload identity on a cluster, ``GOOGLE_APPLICATION_CREDENTIALS``, or those of
``gcloud auth application-default login``. Without any, requests are anonymous, which is enough for public buckets and
for the emulator that ``STORAGE_EMULATOR_HOST`` names.
"""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kubetuner.config.source_sections import DatasetSource
from kubetuner.errors import DatasetError
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
    from google.cloud.storage import Blob, Client

logger = logging.getLogger(__name__)

PAGE_SIZE = 1000
CHUNK_BYTES = 32 << 20
"""Larger objects are read in parts of this size, several at once."""
RETRY_SECONDS = 120.0
"""How long the client repeats one request that fails for passing reasons."""
REQUEST_SECONDS = 60.0
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_FIELDS = "items(name,size,generation,crc32c,contentEncoding,timeCreated),nextPageToken"
_ADDRESS = re.compile(r"gs://([^/]+)(?:/(.*))?")

Result = TypeVar("Result")


class GcsSource:
    """The objects below a prefix; each is read at the generation that was listed."""

    key = "instance_data_dir"
    readers = 10

    def __init__(self, settings: DatasetSource) -> None:
        match = _ADDRESS.fullmatch(settings.instance_data_dir)
        if match is None:
            raise DatasetError(
                f"{settings.instance_data_dir!r} is no address like gs://bucket/prefix; check {self.key}"
            )
        self.place = settings.instance_data_dir
        self._client = _client()
        self._bucket = self._client.bucket(match[1])
        self._prefix = f"{match[2].rstrip('/')}/" if (match[2] or "").strip("/") else ""

    def listing(self) -> Listing:
        """See :class:`Source`."""
        return self._calling(f"listing {self.place}", lambda: folder_listing(self._items()))

    def read(self, item: Item) -> bytes:
        """See :class:`Source`."""

        def fetch() -> bytes:
            blob = self._blob(item)
            if item.size > CHUNK_BYTES:
                return verify(item, _in_chunks(blob))
            return verify(item, blob.download_as_bytes(checksum="crc32c", **_request()))

        return self._calling(f"reading {self._address(item)}", fetch)

    def header(self, item: Item, length: int) -> bytes:
        """See :class:`Source`."""
        if 0 <= item.size <= length:
            return self.read(item)

        def fetch() -> bytes:
            return bytes(self._blob(item).download_as_bytes(start=0, end=length - 1, checksum=None, **_request()))

        return self._calling(f"reading the start of {self._address(item)}", fetch)

    def read_table(self, path: str) -> tuple[Item, bytes]:
        """See :class:`~kubetuner.sources.captioned.HoldsTables`."""
        match = _ADDRESS.fullmatch(path)
        bucket = self._client.bucket(match[1]) if match else self._bucket
        name = (match[2] if match else path) or ""

        def fetch() -> tuple[Item, bytes]:
            blob = bucket.get_blob(name, **_request())
            if blob is None:
                raise DatasetError(f"there is no gs://{bucket.name}/{name}; check parquet.path")
            item = Item(path, blob.size, str(blob.generation), _written(blob))
            return item, blob.download_as_bytes(checksum="crc32c", if_generation_match=blob.generation, **_request())

        return self._calling(f"reading gs://{bucket.name}/{name}", fetch)

    def close(self) -> None:
        """See :class:`Source`."""
        self._client.close()

    def _items(self) -> Iterator[Item]:
        blobs = self._client.list_blobs(
            self._bucket, prefix=self._prefix, page_size=PAGE_SIZE, fields=_FIELDS, **_request()
        )
        for blob in blobs:
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


def _client() -> "Client":
    import google.auth
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    credentials, project = AnonymousCredentials(), None
    if not os.environ.get("STORAGE_EMULATOR_HOST"):
        try:
            credentials, project = google.auth.default(scopes=[_SCOPE])
        except DefaultCredentialsError as error:
            if path := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                raise DatasetError(
                    f"GOOGLE_APPLICATION_CREDENTIALS is {path!r}, which cannot be used: {error}"
                ) from error
            logger.info("there are no Google credentials: requests are anonymous")
    # A project is asked for but not used: names of buckets are unique in the world.
    return storage.Client(project=project or "none", credentials=credentials)


def _request() -> dict[str, Any]:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {"timeout": REQUEST_SECONDS, "retry": DEFAULT_RETRY.with_timeout(RETRY_SECONDS)}


def _in_chunks(blob: "Blob") -> bytes:
    """A large object by Google's transfer manager: parts on several threads."""
    from google.cloud.storage import transfer_manager

    with tempfile.TemporaryDirectory(prefix="kubetuner-gcs-") as folder:
        path = Path(folder) / "object"
        transfer_manager.download_chunks_concurrently(
            blob,
            str(path),
            chunk_size=CHUNK_BYTES,
            download_kwargs=_request(),
            worker_type=transfer_manager.THREAD,
            crc32c_checksum=True,
        )
        return path.read_bytes()
