"""``kubetuner cache``: what the store holds, whether it is whole, and how to make room."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import click

from kubetuner.errors import ArtifactError, InputError
from kubetuner.steps.planning.page import amount
from kubetuner.store import STORE_VARIABLE, Store, open_store
from kubetuner.storekeeping import (
    DAY,
    damaged,
    find_garbage,
    namespaces,
    remove,
    used_by_artifacts,
)


def list_store(address: str | None) -> None:
    """Print a line per namespace and their sum."""
    found = namespaces(_store(address), time.time())
    rows = [("namespace", "shards", "samples", "bytes", "last used")]
    rows += [
        (one.name, f"{one.shards:,}", f"{one.samples:,}", amount(one.bytes), _ago(one.unused_seconds)) for one in found
    ]
    shards, samples, size = (sum(getattr(one, name) for one in found) for name in ("shards", "samples", "bytes"))
    rows.append(("all", f"{shards:,}", f"{samples:,}", amount(size), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for name, *numbers in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)]
        click.echo("  ".join([f"{name:<{widths[0]}}", *cells]).rstrip())


def verify_store(address: str | None) -> None:
    """Read every byte and compare checksums.

    Raises:
        ArtifactError: Some shards are damaged; each is named before.
    """
    store = _store(address)
    lost = 0
    for path, samples in damaged(store):
        click.echo(f"damaged: {path} ({samples} samples)", err=True)
        lost += 1
    total = len(store.entries()) + lost
    if lost:
        raise ArtifactError(
            f"{lost} of {total} shards in {store.place} are missing or damaged; the next cache_vae or "
            "cache_text_embeds that needs their samples encodes them again."
        )
    click.echo(f"{total} shards are whole")


def collect_garbage(address: str | None, keep: Sequence[Path], unused_days: float, *, dry_run: bool) -> None:
    """Remove what no artifact below ``keep`` uses and no step has used for ``unused_days``."""
    store = _store(address)
    found = find_garbage(store, used_by_artifacts(keep), unused_days, time.time())
    chosen = found if dry_run else remove(store, found, unused_days)
    for one in chosen:
        click.echo(f"{one.file.name}  {amount(one.file.bytes)}  {one.reason}")
    size = amount(sum(one.file.bytes for one in chosen))
    click.echo(f"{'would remove' if dry_run else 'removed'} {len(chosen)} files, {size}")


def _store(address: str | None) -> Store:
    named = address or os.environ.get(STORE_VARIABLE, "")
    if not named:
        raise InputError(f"--store is missing, and {STORE_VARIABLE} is not set.")
    if "://" not in named and not Path(named).is_dir():
        raise InputError(f"{named} is not a folder; expected a store, such as the folder store/ of a run.")
    return open_store(named)


def _ago(seconds: float) -> str:
    days = seconds / DAY
    return f"{days:.0f} days ago" if days >= 2 else f"{seconds / 3600:.0f} hours ago"
