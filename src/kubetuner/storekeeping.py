"""What a store holds, whether it is whole, and what nothing needs any more.

A shard may be removed when no kept artifact names it and no step has claimed it for the given time. Steps claim what
they use when they start and every hour while they work (:mod:`kubetuner.store`), so a limit of a day or more never
takes anything from a run in progress. A step that claims a shard at the very moment it is removed finds it
missing and encodes its samples again.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    Artifact,
    LatentsArtifact,
    TextEmbedsArtifact,
    read_artifact,
)
from kubetuner.errors import InputError
from kubetuner.store import DamagedShardError, Store
from kubetuner.store.files import INDEX, SHARDS, Stored

DAY = 86400.0
# Steps renew their claims every hour; a day leaves room for pods that were held up.
LEAST_UNUSED_DAYS = 1.0


@dataclass(frozen=True)
class Namespace:
    """The shards of one encoder and setting.

    Attributes:
        name: Such as ``latents-0a1b…``.
        shards: Number of shards.
        samples: Samples in them.
        bytes: Their sizes together.
        unused_seconds: Since a step last claimed one of them.
    """

    name: str
    shards: int
    samples: int
    bytes: int
    unused_seconds: float


@dataclass(frozen=True)
class Garbage:
    """One thing in the store that nothing needs.

    Attributes:
        file: A shard, or what a killed writer left.
        entries: Index entries of the shard.
        reason: Why it may go, for a person.
    """

    file: Stored
    entries: tuple[Stored, ...]
    reason: str


def namespaces(store: Store, now: float) -> list[Namespace]:
    """All namespaces by name; ``now`` is the time as :func:`time.time` tells it."""
    spaces: dict[str, list[Stored]] = defaultdict(list)
    for entry in store.entries():
        spaces[entry.namespace].append(entry)
    found = []
    for name, entries in sorted(spaces.items()):
        shards = store.shards_of(entries)
        if not shards:
            continue
        samples, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
        claimed = max(entry.touched for entry in entries)
        found.append(Namespace(name, len(shards), samples, size, now - claimed))
    return found


def damaged(store: Store) -> Iterator[tuple[str, int]]:
    """Read all shards and yield those that are missing or damaged: the file and how many samples are lost.

    They are taken out of the index, so that the next cache step encodes their samples again.
    """
    for entry in store.entries():
        index = store.read_entry(entry)
        if index is None:
            store.files.remove(entry)
            yield f"{store.place}/{entry.name}", 0
            continue
        try:
            store.verify_bytes(index.shard.file)
        except DamagedShardError:
            yield store.where(index.shard.file), len(index.keys)


def used_by_artifacts(folders: Sequence[Path]) -> set[str]:
    """File names of the shards that the artifacts anywhere below ``folders`` refer to.

    Raises:
        InputError: A folder is missing.
        ArtifactError: An artifact cannot be read, so what it needs is not known.
    """
    used: set[str] = set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"--keep {folder}: there is no such folder.")
        for file in folder.rglob(ARTIFACT_FILE):
            artifact = read_artifact(file.parent, Artifact)
            if isinstance(artifact, LatentsArtifact | TextEmbedsArtifact):
                used.update(shard.file for shard in artifact.shards)
    return used


def find_garbage(store: Store, kept: set[str], unused_days: float, now: float) -> list[Garbage]:
    """What may be removed, sorted by path.

    Args:
        store: Where to look.
        kept: Names of shards that stay whatever their age; see :func:`used_by_artifacts`.
        unused_days: Only what nothing touched for so many days.
        now: The time as :func:`time.time` tells it.

    Raises:
        InputError: ``unused_days`` is below :data:`LEAST_UNUSED_DAYS`.
    """
    if not unused_days >= LEAST_UNUSED_DAYS:
        raise InputError(
            f"--unused-days is {unused_days:g}; expected {LEAST_UNUSED_DAYS:g} or more, since what was used more "
            "recently may be needed by a run in progress."
        )
    limit = now - unused_days * DAY
    entries: dict[str, list[Stored]] = defaultdict(list)
    loose: list[Stored] = []
    for file in store.files.listing(INDEX):
        # Half-written index entries are of no shard.
        (loose if file.file.startswith(".") else entries[file.shard]).append(file)
    found = []
    for shard in store.files.listing(SHARDS):
        its = entries.pop(shard.file, [])
        if shard.file not in kept and (one := _garbage(shard, its, limit, now)) is not None:
            found.append(one)
    # What is left are entries whose shard is gone.
    loose += [entry for known in entries.values() for entry in known]
    found += [Garbage(file, (), "no shard") for file in loose if file.touched < limit]
    return sorted(found, key=lambda one: one.file.name)


def remove(store: Store, garbage: Iterable[Garbage], unused_days: float) -> list[Garbage]:
    """Remove ``garbage``; what a step has claimed since it was found stays. Returns what was removed."""
    return [one for one in garbage if _remove(store, one, unused_days)]


def _remove(store: Store, one: Garbage, unused_days: float) -> bool:
    if one.entries:
        return store.files.remove_unclaimed(one.file, one.entries, time.time() - unused_days * DAY)
    store.files.remove(one.file)
    return True


def _garbage(shard: Stored, entries: Sequence[Stored], limit: float, now: float) -> Garbage | None:
    used = max(entry.touched for entry in entries) if entries else shard.touched
    if used >= limit:
        return None
    days = (now - used) / DAY
    reason = f"not used for {days:.0f} days" if entries else f"left unfinished or forgotten {days:.0f} days ago"
    return Garbage(shard, tuple(entries), reason)
