"""Content keys of very many samples and the shard that each is in; on disk, so that any number fits into memory."""

from array import array
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from kubetuner.artifacts import ShardEntry
from kubetuner.scratch import Scratch

# A shard of latents is written, and so survives a kill, after this many encoded samples.
SAMPLES_PER_SHARD = 256
# SQLite before 3.32 takes at most 999.
_ASKED_AT_ONCE = 512

_TABLES = (
    # ``first`` is the first place that has the same key.
    "CREATE TABLE keys (place INTEGER PRIMARY KEY, key BLOB, rank INTEGER, first INTEGER)",
    "CREATE TABLE shards (first INTEGER PRIMARY KEY, shard INTEGER)",
)
_FIND_TWINS = """
    UPDATE keys SET first = (SELECT min(twin.place) FROM keys AS twin WHERE twin.key = keys.key)
    WHERE key IN (SELECT key FROM keys GROUP BY key HAVING count(*) > 1)
"""
_WITH_SHARDS = "keys LEFT JOIN shards USING (first)"
_MISSING = f"FROM {_WITH_SHARDS} WHERE place = first AND shard IS NULL"


class Keys:
    """Content keys (SHA-256, hex) of samples by place; equal ones share a shard. Threads may use it.

    Args:
        entries: Place, key and rank of each sample. Places and ranks are numbers that mean something to the caller
            alone: where the sample is found again, and when it is to be encoded.
    """

    def __init__(self, entries: Iterable[tuple[int, str, int]]) -> None:
        self._scratch = Scratch(*_TABLES)
        packed = ((place, bytes.fromhex(key), rank) for place, key, rank in entries)
        self._scratch.run_each("INSERT INTO keys VALUES (?1, ?2, ?3, ?1)", packed)
        self._scratch.run("CREATE INDEX places ON keys (key)")
        self._scratch.run(_FIND_TWINS)
        self._shards: list[ShardEntry] = []

    def __len__(self) -> int:
        return self._scratch.number("SELECT count(*) FROM keys")

    @property
    def distinct(self) -> int:
        """How many different keys there are."""
        return self._scratch.number("SELECT count(*) FROM keys WHERE place = first")

    def __getitem__(self, place: int) -> str:
        (key,) = self._scratch.row("SELECT key FROM keys WHERE place = ?", (place,)) or (b"",)
        return bytes(key).hex()

    def numbers(self, keys: Collection[str]) -> "array[int]":
        """The numbers of those of ``keys`` that are here, for :meth:`put`."""
        return array("q", self._numbers(keys, "SELECT min(place) FROM keys WHERE key IN ({}) GROUP BY key"))

    def lacking(self, keys: Collection[str]) -> "array[int]":
        """As :meth:`numbers`, of those that are in no shard yet."""
        return array("q", self._numbers(keys, f"SELECT place {_MISSING} AND key IN ({{}})"))

    def _numbers(self, keys: Collection[str], query: str) -> Iterator[int]:
        packed = map(bytes.fromhex, keys)
        while some := tuple(islice(packed, _ASKED_AT_ONCE)):
            for (number,) in self._scratch.rows(query.format(",".join("?" * len(some))), some):
                yield number

    def find(self, key: str) -> ShardEntry | None:
        """The shard that ``key`` is in; ``None`` where there is none, or no such key."""
        query = f"SELECT shard FROM {_WITH_SHARDS} WHERE key = ?"
        (shard,) = self._scratch.row(query, (bytes.fromhex(key),)) or (None,)
        return None if shard is None else self._shards[shard]

    def put(self, numbers: Iterable[int], shard: ShardEntry) -> None:
        """Note that these keys are in ``shard``; what was noted of them before is forgotten."""
        rows = ((number, len(self._shards)) for number in numbers)
        self._scratch.run_each("INSERT OR REPLACE INTO shards VALUES (?, ?)", rows)
        self._shards.append(shard)

    def placed(self, *, once: bool = False) -> Iterator[tuple[int, str, ShardEntry | None]]:
        """Every place with its key and the shard that the key is in, by place; ``once``: the first of every key."""
        chosen = "WHERE place = first" if once else ""
        query = f"SELECT place, key, shard FROM {_WITH_SHARDS} {chosen} ORDER BY place"
        for place, key, shard in self._scratch.rows(query):
            yield place, key.hex(), None if shard is None else self._shards[shard]

    def shards(self) -> tuple[ShardEntry, ...]:
        """Every shard that a key is in, by file name."""
        used = self._scratch.rows("SELECT DISTINCT shard FROM shards")
        return tuple(sorted((self._shards[number] for (number,) in used), key=lambda shard: shard.file))

    def missing(self, *, by_key: bool = False) -> "array[int]":
        """The first place of every key that is in no shard, by rank; of one rank by place, or by key, backwards."""
        order = "rank, key DESC" if by_key else "rank, place"
        return array("q", (place for (place,) in self._scratch.rows(f"SELECT place {_MISSING} ORDER BY {order}")))
