"""What a store holds, whether it is whole, and what nothing needs any more.

A shard may be removed when no kept artifact names it and no step has claimed it for the given time. Steps claim what
they use when they start and every hour while they work (:mod:`kubetuner.store`), so a limit of a day or more never
takes anything from a run in progress. A step that claims a shard at the very moment it is removed finds it
missing and encodes its samples again.
"""

import time
import uuid
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
from kubetuner.errors import ArtifactError, InputError
from kubetuner.store import Store

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
        path: A shard, or what a killed writer left.
        entries: Index entries of the shard.
        bytes: Size of the file.
        reason: Why it may go, for a person.
    """

    path: Path
    entries: tuple[Path, ...]
    bytes: int
    reason: str


def namespaces(store: Store, now: float) -> list[Namespace]:
    """All namespaces by name; ``now`` is the time as :func:`time.time` tells it."""
    found = []
    for folder in sorted(path for path in (store.root / "index").glob("*") if path.is_dir()):
        entries = sorted(folder.glob("*.json"))
        shards = [index.shard for entry in entries if (index := store.read_entry(entry)) is not None]
        if not shards:
            continue
        samples, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
        found.append(Namespace(folder.name, len(shards), samples, size, now - max(map(_claimed, entries))))
    return found


def damaged(store: Store) -> Iterator[tuple[Path, int]]:
    """Read all shards and yield those that are missing or damaged: the file and how many samples are lost.

    They are taken out of the index, so that the next cache step encodes their samples again.
    """
    for entry in store.entries():
        index = store.read_entry(entry)
        if index is None:
            entry.unlink(missing_ok=True)
            yield entry, 0
            continue
        try:
            store.verify_bytes(index.shard.file)
        except ArtifactError:
            yield store.path(index.shard.file), len(index.keys)


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
    entries: dict[str, list[Path]] = defaultdict(list)
    for entry in store.entries():
        entries[f"{entry.stem}.safetensors"].append(entry)
    found = [
        one
        for path in sorted((store.root / "shards").glob("*"))
        if path.name not in kept and (one := _garbage(path, entries.get(path.name, []), limit, now)) is not None
    ]
    # Half-written index entries, and those whose shard is gone.
    loose = [*(store.root / "index").glob("*/.*.tmp")]
    loose += [entry for file, known in entries.items() if not store.path(file).exists() for entry in known]
    found += [Garbage(path, (), path.stat().st_size, "no shard") for path in loose if _moved(path) < limit]
    return sorted(found, key=lambda one: one.path)


def remove(store: Store, garbage: Iterable[Garbage], unused_days: float) -> list[Garbage]:
    """Remove ``garbage``; what a step has claimed since it was found stays. Returns what was removed."""
    return [one for one in garbage if _remove(store, one, unused_days)]


def _remove(store: Store, one: Garbage, unused_days: float) -> bool:
    if not one.entries:
        one.path.unlink(missing_ok=True)
        return True
    # Steps claim first and look second. So the shard is taken aside first and its claims are looked at second: either
    # we see the claim and put it back, or the step sees that it is missing.
    aside = store.root / "shards" / f".removing-{uuid.uuid4().hex}"
    try:
        one.path.rename(aside)
    except FileNotFoundError:  # Another gc was faster.
        return False
    if any(_claimed(entry) >= time.time() - unused_days * DAY for entry in one.entries):
        aside.rename(one.path)
        return False
    for entry in one.entries:
        entry.unlink(missing_ok=True)
    aside.unlink()
    return True


def _garbage(path: Path, entries: Sequence[Path], limit: float, now: float) -> Garbage | None:
    used = max(map(_claimed, entries)) if entries else _moved(path)
    if used >= limit:
        return None
    days = (now - used) / DAY
    reason = f"not used for {days:.0f} days" if entries else f"left unfinished or forgotten {days:.0f} days ago"
    return Garbage(path, tuple(entries), path.stat().st_size, reason)


def _claimed(entry: Path) -> float:
    """When an index entry was last claimed, in seconds; long ago for what is gone."""
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _moved(path: Path) -> float:
    """When a file was last written or renamed, in seconds: shards are not dated by the clock."""
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0
