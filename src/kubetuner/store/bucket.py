"""A store's files in a Google Cloud Storage bucket, with a mirror of the shards in use on this machine.

Objects appear whole or not at all, and every change of one gives it another generation (bytes) or metageneration
(metadata). On these the rules rest that a folder gets from renames and modification times:

* A shard is uploaded on the condition that there is none. Where there is one, its CRC32C tells whether it has the same
  bytes; a damaged one is replaced on the condition that nobody else has replaced it meanwhile.
* The metadata ``sha256`` says that a shard's checksum was right when it was written; whoever replaces the object by
  other means takes the word away, and the shard is hashed again. The metadata ``claimed`` of an index entry is its
  claim.
* An object is removed on the condition that neither its bytes nor its claim have changed since it was listed. Index
  entries go first: a step that claims one afterwards finds it missing.
"""

import base64
import hashlib
import logging
import math
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kubetuner.artifacts import ShardEntry
from kubetuner.errors import ArtifactError
from kubetuner.google_storage import connect, list_objects, repeated, request_options, split_address
from kubetuner.store.files import INDEX, SHARDS, DamagedError, Lease, Stored
from kubetuner.store.folder import WRONG_BYTES
from kubetuner.store.mirror import FETCHERS, Mirror, Sink

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Client

logger = logging.getLogger(__name__)

WRITES = 4
"""How often a shard is uploaded while others remove or replace the object in between."""
WHOLE_BYTES = 32 << 20
"""Smaller shards are received in one piece; Google's loop over pieces of 8 KiB takes as long as the network does."""
_FIELDS = "name,size,generation,metageneration,updated,metadata,crc32c"
_LABEL, _CLAIM = "sha256", "claimed"

Result = TypeVar("Result")


class Bucket:
    """Files below ``gs://bucket/prefix``.

    Args:
        address: As a person gave it.
        folder: Where shards are kept on this machine.
        bound: Bytes of them.

    Raises:
        ArtifactError: The address or the credentials cannot be used.
    """

    readers = 16

    def __init__(self, address: str, folder: Path, bound: int) -> None:
        parts = split_address(address)
        if parts is None:
            raise ArtifactError(f"{address!r} is no address like gs://bucket/prefix; check KUBETUNER_STORE")
        self._client: Client = connect("read_write", self.readers + FETCHERS, ArtifactError)
        # Nobody closes a store; its connections go with it.
        weakref.finalize(self, self._client.close)
        self._bucket, self._prefix = self._client.bucket(parts[0]), parts[1]
        self.place = f"gs://{parts[0]}/{parts[1]}".rstrip("/")
        self._sizes: dict[str, int] = {}
        self._expected: dict[str, None] = {}
        self._told = 0
        self._read_only = False
        self._mirror = Mirror(folder, bound, self._size, self._load)
        # Where not all shards fit: a third of the room each for those in use, those fetched ahead, and one in between.
        self._share = bound / 3
        self.leased_bytes = self._share

    def path(self, file: str) -> Path:
        """See :class:`Files`."""
        return self._mirror.path(file)

    def listing(self, folder: str) -> list[Stored]:
        """See :class:`Files`."""
        return [self._stored(blob) for blob in self._blobs(folder)]

    def read(self, name: str) -> bytes | None:
        """See :class:`Files`."""
        return self._calling("reading", name, lambda: self._get(name, checksum="crc32c"))

    def read_start(self, file: str, length: int) -> bytes:
        """See :class:`Files`."""
        name = f"{SHARDS}/{file}"
        start = self._calling("reading", name, lambda: self._get(name, end=length - 1, checksum=None))
        if start is None:
            raise ArtifactError(f"shard {self.place}/{name} is missing; run the step that caches it again")
        return start

    def write(self, name: str, data: bytes) -> None:
        """See :class:`Files`."""
        blob = self._bucket.blob(self._prefix + name)
        blob.metadata = {_CLAIM: _now()}
        self._calling("writing", name, lambda: blob.upload_from_string(data, checksum="crc32c", **request_options()))

    def write_shard(self, shard: ShardEntry, data: bytes) -> None:
        """See :class:`Files`."""
        name = f"{SHARDS}/{shard.file}"
        checksum = _crc32c(data)
        for _ in range(WRITES):
            found = self._find(name)
            if found is not None and found.crc32c == checksum:
                # It is marked, so that a gc that listed it before leaves it.
                if self._patch(name, {_LABEL: shard.sha256, _CLAIM: _now()}):
                    break
            elif self._upload(name, shard, data, found):
                break
        else:
            raise ArtifactError(f"{self.place}/{name} is replaced again and again by somebody else; find out by whom")
        self._sizes[shard.file] = shard.bytes

    def claim(self, names: Collection[str]) -> None:
        """See :class:`Files`."""
        if not self._read_only:
            self._each(lambda name: self._patch(name, {_CLAIM: _now()}), names)

    def damages(self, shards: Iterable[ShardEntry]) -> dict[str, str]:
        """See :class:`Files`."""
        wanted = {shard.file: shard for shard in shards}
        found = {Path(blob.name).name: blob for blob in self._blobs(SHARDS)} if wanted else {}
        self._sizes.update((file, found[file].size) for file in wanted.keys() & found.keys())
        result = {}
        unlabelled = []
        for file, shard in wanted.items():
            blob = found.get(file)
            if blob is None:
                result[file] = "is missing"
            elif blob.size != shard.bytes:
                result[file] = f"is damaged: it has {blob.size} bytes, expected {shard.bytes}"
            elif (blob.metadata or {}).get(_LABEL) != shard.sha256:
                unlabelled.append(file)
        result.update((file, damage) for file, damage in self._each(self._doubted, unlabelled) if damage)
        return result

    def damaged_bytes(self, file: str) -> str:
        """See :class:`Files`."""
        hashing = _Digest()
        try:
            self._load(file, hashing)
        except DamagedError as damage:
            return str(damage)
        if hashing.digest() != Path(file).stem:
            return WRONG_BYTES
        if not self._read_only:
            self._patch(f"{SHARDS}/{file}", {_LABEL: hashing.digest()})
        return ""

    def lease(self, file: str) -> Lease:
        """See :class:`Files`."""
        return self._mirror.lease(file)

    def expect(self, shards: Sequence[ShardEntry]) -> bool:
        """See :class:`Files`."""
        self._sizes.update((shard.file, shard.bytes) for shard in shards)
        self._expected.update(dict.fromkeys(shard.file for shard in shards))
        total = self._bytes(self._expected)
        fit = total <= self._mirror.bound
        logger.info(
            "%s: %d shards, %.3f GiB, %s in %s",
            self.place, len(self._expected), total / 2**30, "kept" if fit else "some of them kept", self._mirror.folder,
        )  # fmt: skip
        self.leased_bytes = math.inf if fit else self._share
        self._mirror.fetch_ahead(self._expected if fit else ())
        return fit

    def fetch_ahead(self, batches: Sequence[Collection[str]]) -> None:
        """See :class:`Files`."""
        ahead, room = [], self._share
        for file in dict.fromkeys(file for batch in batches for file in batch):
            room -= self._size(file)
            if room < 0:
                break
            ahead.append(file)
        needed = max(map(self._bytes, batches))
        if needed > max(self._mirror.bound, self._told):
            self._told = needed
            logger.warning(
                "one batch reads shards of %.3f GiB, and KUBETUNER_STORE_CACHE_GIB allows %.3f: every batch fetches "
                "its shards again; allow twice as much as a batch reads, better as much as all shards (%.3f)",
                needed / 2**30, self._mirror.bound / 2**30, self._bytes(self._expected) / 2**30,
            )  # fmt: skip
        self._mirror.fetch_ahead(ahead)

    def remove(self, file: Stored) -> None:
        """See :class:`Files`."""
        self._delete(file)

    def remove_unclaimed(self, shard: Stored, entries: Sequence[Stored], since: float) -> bool:
        """See :class:`Files`."""
        for entry in entries:
            found = self._find(entry.name)
            if found is not None and (self._stored(found).touched >= since or not self._delete(self._stored(found))):
                return False
        return self._delete(shard)

    def check(self) -> None:
        """See :class:`Files`."""
        name = f"{INDEX}/.check-{uuid.uuid4().hex}"
        self.listing(name)
        self.write(name, b"")
        probe = self._find(name)
        if probe is not None and not self._delete(self._stored(probe)):
            raise ArtifactError(f"{self.place}: objects cannot be removed ({name}); {_ROLE}")

    def _doubted(self, file: str) -> tuple[str, str]:
        return file, self.damaged_bytes(file)

    def _each(self, call: Callable[[str], Result], names: Collection[str]) -> list[Result]:
        with ThreadPoolExecutor(self.readers, "kubetuner-store") as pool:
            return list(pool.map(call, names))

    def _blobs(self, folder: str) -> "list[Blob]":
        return self._calling(
            "listing", folder, lambda: list(list_objects(self._bucket, f"{self._prefix}{folder}/", _FIELDS))
        )

    def _stored(self, blob: "Blob") -> Stored:
        claimed = float((blob.metadata or {}).get(_CLAIM, 0))
        touched = max(claimed, blob.updated.timestamp() if blob.updated else 0.0)
        version = f"{blob.generation}.{blob.metageneration}"
        return Stored(blob.name.removeprefix(self._prefix), blob.size, touched, version)

    def _find(self, name: str) -> "Blob | None":
        return self._calling(
            "looking at", name, lambda: self._bucket.get_blob(self._prefix + name, **request_options())
        )

    def _bytes(self, files: Iterable[str]) -> int:
        return sum(map(self._size, files))

    def _size(self, file: str) -> int:
        if file not in self._sizes:
            found = self._find(f"{SHARDS}/{file}")
            if found is None:
                raise DamagedError("is missing")
            self._sizes[file] = int(found.size)
        return self._sizes[file]

    def _get(self, name: str, **options: Any) -> bytes | None:
        from google.api_core.exceptions import NotFound

        try:
            return bytes(self._bucket.blob(self._prefix + name).download_as_bytes(**options, **request_options()))
        except NotFound:
            return None

    def _load(self, file: str, sink: Sink) -> None:
        """Write the bytes of a shard to ``sink`` as they are in the bucket."""
        from google.api_core.exceptions import NotFound

        name = f"{SHARDS}/{file}"
        blob = self._bucket.blob(self._prefix + name)
        whole = self._size(file) <= WHOLE_BYTES

        def load() -> bool:
            sink.restart()
            try:
                blob.download_to_file(sink, checksum="crc32c", single_shot_download=whole, **request_options())
            except NotFound:
                return False
            return True

        if not self._calling("reading", name, load):
            raise DamagedError("is missing")

    def _upload(self, name: str, shard: ShardEntry, data: bytes, found: "Blob | None") -> bool:
        """Put a shard in the place of ``found``; ``False`` when that has changed meanwhile."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._prefix + name)
        blob.metadata = {_LABEL: shard.sha256}
        condition = 0 if found is None else found.generation

        def upload() -> bool:
            try:
                blob.upload_from_string(data, checksum="crc32c", if_generation_match=condition, **request_options())
            except PreconditionFailed:
                return False
            return True

        return self._calling("writing", name, upload)

    def _patch(self, name: str, metadata: dict[str, str]) -> bool:
        """Change metadata; ``False`` when the object is gone or may not be changed."""
        from google.api_core.exceptions import Forbidden, NotFound

        blob = self._bucket.blob(self._prefix + name)
        blob.metadata = metadata

        def patch() -> bool:
            try:
                blob.patch(**request_options())
            except NotFound:
                return False
            except Forbidden:
                if not self._read_only:
                    logger.warning("%s can only be read: what is used is not noted there", self.place)
                self._read_only = True
                return False
            return True

        return self._calling("claiming", name, patch)

    def _delete(self, file: Stored) -> bool:
        """Remove an object as it was listed; ``False`` when it has changed since or may not be removed."""
        from google.api_core.exceptions import Forbidden, NotFound, PreconditionFailed

        generation, _, metageneration = file.version.partition(".")
        blob = self._bucket.blob(self._prefix + file.name)
        unchanged = {"if_generation_match": int(generation), "if_metageneration_match": int(metageneration)}

        def delete() -> bool:
            try:
                blob.delete(**unchanged, **request_options())
            except (PreconditionFailed, Forbidden):
                return False
            except NotFound:
                pass
            return True

        return self._calling("removing", file.name, delete)

    def _calling(self, verb: str, name: str, call: Callable[[], Result]) -> Result:
        """Turn Google's exceptions into ours, and repeat what may pass and Google's own retries leave."""
        from google.api_core.exceptions import ClientError, GoogleAPIError
        from google.auth.exceptions import GoogleAuthError

        what = f"{verb} {self.place}/{name}"
        try:
            result: Result = repeated()(call)()
            return result
        except ClientError as error:
            raise ArtifactError(f"{what} failed: {_advice(int(error.code or 0))}") from error
        except (GoogleAPIError, GoogleAuthError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ArtifactError(f"{what} failed: {reason}; try again later") from error


_ROLE = "give the pod's service account the role Storage Object User on the bucket"


def _advice(status: int) -> str:
    if status == 404:
        return "there is no such bucket (404); check KUBETUNER_STORE"
    if status in (401, 403):
        return f"access is denied ({status}); {_ROLE}, or set GOOGLE_APPLICATION_CREDENTIALS"
    return f"the request was refused ({status})"


class _Digest:
    """A sink that keeps nothing but the SHA-256."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._hash = hashlib.sha256()

    def write(self, data: bytes, /) -> int:
        self._hash.update(data)
        return len(data)

    def digest(self) -> str:
        return self._hash.hexdigest()


def _crc32c(data: bytes) -> str:
    """As Google writes it: base64 of four bytes, the highest first."""
    import google_crc32c

    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def _now() -> str:
    return f"{time.time():.3f}"
