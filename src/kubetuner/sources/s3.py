"""Pictures in a bucket of S3 or a compatible store (``type: aws``), by boto3 (``pip install 'kubetuner[s3]'``).

Credentials are boto3's usual ones: a role of the pod's service account, ``AWS_ACCESS_KEY_ID`` and
``AWS_SECRET_ACCESS_KEY``, or a profile. Without any, requests are not signed, which is enough for public buckets.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from kubetuner.config.sections.sources import Bucket, DatasetSource
from kubetuner.errors import DatasetError
from kubetuner.sources.base import Item, Listing, PassingError, first_line, folder_listing, retrying, verify

if TYPE_CHECKING:
    from botocore.client import BaseClient

PAGE_SIZE = 1000
REQUEST_ATTEMPTS = 5
"""How often boto3 repeats a request that was answered with a passing failure."""
_TABLE = "reading the table"
_MD5 = re.compile(r"[0-9a-f]{32}")

Result = TypeVar("Result")


class S3Source:
    """The objects below a prefix; each is read only while its entity tag is the one that was listed."""

    key = "aws_bucket_name"
    readers = 10

    def __init__(self, settings: DatasetSource) -> None:
        if settings.bucket is None:
            raise DatasetError(f"dataset {settings.id!r} names no bucket; set {self.key}")
        folder = settings.instance_data_dir.strip("/")
        self._prefix = f"{folder}/" if folder else ""
        self._bucket = settings.bucket.name
        self.place = f"s3://{self._bucket}/{folder}"
        self._client = _client(settings.bucket, self.readers)

    def listing(self) -> Listing:
        """See :class:`Source`."""
        return self._calling(f"listing {self.place}", lambda: folder_listing(self._items()))

    def read(self, item: Item) -> bytes:
        """See :class:`Source`."""

        def fetch() -> bytes:
            answer = self._get(item)
            data = verify(item, answer["Body"].read())
            tag = item.version.strip('"')
            # Objects sent in parts, or encrypted by a key of the customer's, have tags that are no MD5.
            plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer
            if plain and _MD5.fullmatch(tag) and hashlib.md5(data, usedforsecurity=False).hexdigest() != tag:
                raise PassingError(f"{item.name} arrived damaged: its md5 checksum is wrong")
            return data

        return self._calling(f"reading s3://{self._bucket}/{self._prefix}{item.name}", fetch)

    def header(self, item: Item, length: int) -> bytes:
        """See :class:`Source`."""
        if item.size <= length:
            return self.read(item)

        def fetch() -> bytes:
            return bytes(self._get(item, Range=f"bytes=0-{length - 1}")["Body"].read())

        return self._calling(f"reading the start of s3://{self._bucket}/{self._prefix}{item.name}", fetch)

    def read_table(self, path: str) -> tuple[Item, bytes]:
        """See :class:`~kubetuner.sources.captioned.HoldsTables`."""

        def fetch() -> tuple[Item, bytes]:
            answer = self._client.get_object(Bucket=self._bucket, Key=path)
            item = Item(path, answer["ContentLength"], answer["ETag"], _written(answer))
            return item, verify(item, answer["Body"].read())

        return self._calling(f"{_TABLE} s3://{self._bucket}/{path}", fetch)

    def close(self) -> None:
        """See :class:`Source`."""
        self._client.close()

    def _items(self) -> Iterator[Item]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix, PaginationConfig={"PageSize": PAGE_SIZE}
        )
        for page in pages:
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(self._prefix)
                yield Item(name, entry["Size"], version=entry["ETag"], modified=_written(entry))

    def _get(self, item: Item, **more: str) -> dict[str, Any]:
        asked = {"Bucket": self._bucket, "Key": self._prefix + item.name, "IfMatch": item.version}
        answer: dict[str, Any] = self._client.get_object(**asked, **more)
        return answer

    def _calling(self, what: str, call: Callable[[], Result]) -> Result:
        """Turn boto's exceptions into ours, and repeat what broke off on the way."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            FlexibleChecksumError,
            HTTPClientError,
            IncompleteReadError,
        )

        def once() -> Result:
            try:
                return call()
            except FlexibleChecksumError as error:
                raise PassingError("it arrived damaged: its checksum is wrong") from error
            except (HTTPClientError, IncompleteReadError) as error:
                raise PassingError(type(error).__name__) from error
            except ClientError as error:
                status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
                raise DatasetError(f"{what} failed: {_advice(what, status)}") from error
            except BotoCoreError as error:
                raise DatasetError(f"{what} failed: {first_line(error)}") from error

        return retrying(what, once)


def _written(entry: dict[str, Any]) -> int:
    """When an object was written, in nanoseconds since 1970."""
    return int(entry["LastModified"].timestamp() * 1_000_000) * 1000


def _advice(what: str, status: int) -> str:
    if status == 404 and what.startswith(_TABLE):
        return "there is no such object (404); check parquet.path"
    if status == 404 and what.startswith("listing"):
        return "there is no such bucket (404); check aws_bucket_name and aws_endpoint_url"
    if status in (404, 412):
        return "it was replaced or removed while the step ran; run it again"
    if status in (401, 403):
        return (
            f"access is denied ({status}); give the pod a role that may list and read the bucket, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if status in (301, 400):
        return f"the request was refused ({status}); check aws_region_name and aws_endpoint_url"
    return f"the store answered {status} {REQUEST_ATTEMPTS} times; try again later"


def _client(bucket: Bucket, readers: int) -> "BaseClient":
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ModuleNotFoundError as error:
        raise DatasetError("type aws needs boto3; install kubetuner[s3]") from error
    try:
        session = boto3.session.Session()
        signing = {} if session.get_credentials() else {"signature_version": UNSIGNED}
        config = Config(
            max_pool_connections=readers,
            retries={"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS},
            **signing,
        )
        return session.client(
            "s3",
            endpoint_url=bucket.endpoint_url or None,
            region_name=bucket.region or session.region_name or "us-east-1",
            config=config,
        )
    except (BotoCoreError, ValueError) as error:
        raise DatasetError(f"s3://{bucket.name} cannot be reached: {error}; check aws_endpoint_url") from error
