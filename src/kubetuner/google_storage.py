"""Google Cloud Storage as sources and the store use it: addresses, credentials, retries.

Credentials are Google's usual ones: workload identity on a cluster, ``GOOGLE_APPLICATION_CREDENTIALS``, or those of
``gcloud auth application-default login``. Without any, requests are anonymous, which is enough for public buckets and
for the emulator that ``STORAGE_EMULATOR_HOST`` names.
"""

import logging
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from kubetuner.errors import StepError

if TYPE_CHECKING:
    from google.api_core.retry import Retry
    from google.cloud.storage import Blob, Bucket, Client

logger = logging.getLogger(__name__)

PAGE_SIZE = 1000
RETRY_SECONDS = 120.0
"""How long the client repeats one request that fails for passing reasons."""
REQUEST_SECONDS = 60.0
_SCOPE = "https://www.googleapis.com/auth/devstorage."
_ADDRESS = re.compile(r"gs://([^/]+)(?:/(.*))?")


def split_address(address: str) -> tuple[str, str] | None:
    """Bucket and prefix (empty, or with a ``/`` at its end) of ``gs://bucket/prefix``; ``None`` for another text."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return None
    prefix = (match[2] or "").rstrip("/")
    return match[1], f"{prefix}/" if prefix else ""


def connect(access: Literal["read_only", "read_write"], threads: int, failure: type[StepError]) -> "Client":
    """A client that ``threads`` threads may use at once.

    Raises:
        failure: ``GOOGLE_APPLICATION_CREDENTIALS`` names what cannot be used.
    """
    import google.auth
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage
    from requests.adapters import HTTPAdapter

    credentials, project = AnonymousCredentials(), None
    if not os.environ.get("STORAGE_EMULATOR_HOST"):
        try:
            credentials, project = google.auth.default(scopes=[_SCOPE + access])
        except DefaultCredentialsError as error:
            if path := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                raise failure(f"GOOGLE_APPLICATION_CREDENTIALS is {path!r}, which cannot be used: {error}") from error
            logger.info("there are no Google credentials: requests are anonymous")
    # A project is asked for but not used: names of buckets are unique in the world.
    client = storage.Client(project=project or "none", credentials=credentials)
    for scheme in ("https://", "http://"):
        # One connection a thread: requests keeps ten by itself and opens the others anew each time.
        client._http.mount(scheme, HTTPAdapter(pool_maxsize=max(threads, 10)))
    return client


def request_options() -> dict[str, Any]:
    """Timeout and retries of one request."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {"timeout": REQUEST_SECONDS, "retry": DEFAULT_RETRY.with_timeout(RETRY_SECONDS)}


def list_objects(bucket: "Bucket", prefix: str, fields: str) -> "Iterator[Blob]":
    """The objects of ``bucket`` below ``prefix``, page by page, with the named properties."""
    yield from bucket.client.list_blobs(
        bucket, prefix=prefix, page_size=PAGE_SIZE, fields=f"items({fields}),nextPageToken", **request_options()
    )


def repeated() -> "Retry":
    """Repeats what the client's own retries leave.

    That is bytes that arrived damaged, connections cut at the wrong time, and uploads whose session was lost (410).
    """
    from google.api_core.exceptions import GoogleAPICallError
    from google.api_core.retry import Retry
    from google.cloud.storage.exceptions import DataCorruption
    from requests.exceptions import RequestException
    from urllib3.exceptions import HTTPError

    def passing(error: BaseException) -> bool:
        lost = isinstance(error, GoogleAPICallError) and error.code == 410
        return lost or isinstance(error, DataCorruption | RequestException | HTTPError)

    return Retry(passing, initial=0.5, maximum=20.0, timeout=RETRY_SECONDS)
