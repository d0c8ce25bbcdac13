"""Checkpoints that are either complete or not there.

``<root>/<key>/checkpoint-<step>/`` holds the trained weights, their averages, the optimizer's state and the losses so
far. It is written under a temporary name; ``manifest.json`` with every file's checksum comes last, then the folder gets
its name. A folder without a manifest, or whose files differ from it (a full disk, a storage without atomic renames), is
skipped.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kubetuner.artifacts import LOSSES_FILE, FileEntry, Record, list_files, read_rows, write_rows, write_text
from kubetuner.digests import sha256_of
from kubetuner.errors import TrainingError

logger = logging.getLogger(__name__)

_WEIGHTS, _AVERAGES = "weights.safetensors", "averages.safetensors"
_OPTIMIZER, _MANIFEST = "optimizer.pt", "manifest.json"


class LossPoint(Record):
    """A logged step (a row of ``losses.jsonl``); ``step`` is 1 for the first."""

    step: int
    loss: float
    lr: float


class Manifest(Record):
    """What a complete checkpoint holds: the optimizer steps taken, and every other file with its checksum."""

    step: int
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Snapshot:
    """The state between two optimizer steps.

    Attributes:
        step: Optimizer steps taken.
        weights: The trained parameters by name.
        optimizer: The optimizer's ``state_dict``.
        points: What was logged so far.
        averages: The averaged parameters by name; empty without averaging.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    points: tuple[LossPoint, ...]
    averages: Mapping[str, Tensor] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run: equal settings and inputs give an equal ``key``."""

    def __init__(self, root: Path, key: str, limit: int) -> None:
        self._folder, self._limit = root / key, limit
        self.beside = root / f"{key}-nonfinite"  # Outlives the checkpoints: see kubetuner.training.nonfinite.

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint, then delete the oldest ones above the limit (0 keeps all)."""
        final = self._folder / f"checkpoint-{snapshot.step}"
        temporary = self._folder / f".checkpoint-{snapshot.step}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file, weights in ((_WEIGHTS, snapshot.weights), (_AVERAGES, snapshot.averages)):
            save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, temporary / file)
        torch.save(dict(snapshot.optimizer), temporary / _OPTIMIZER)
        write_rows(temporary, LOSSES_FILE, snapshot.points)
        for path in temporary.iterdir():
            _flush(path)
        text = Manifest(step=snapshot.step, files=list_files(temporary)).model_dump_json(indent=2)
        write_text(temporary / _MANIFEST, text)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        self._prune()
        return final

    def load(self, name: str) -> Snapshot | None:
        """The checkpoint to go on from.

        Args:
            name: ``latest`` for the newest complete one, ``checkpoint-<step>`` for that one, empty for none.

        Raises:
            TrainingError: A named checkpoint is missing or damaged.
        """
        if not name:
            return None
        if name == "latest":
            return next((snapshot for folder in self._newest_first() if (snapshot := _read(folder))), None)
        snapshot = _read(self._folder / name)
        if snapshot is None:
            have = ", ".join(folder.name for folder in self._newest_first()) or "none"
            raise TrainingError(
                f"resume_from_checkpoint: no usable {name!r} in {self._folder} (there: {have}); set it to 'latest'"
            )
        return snapshot

    def remove(self) -> None:
        """Delete all checkpoints of this run, and the root if nothing else is in it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._folder.parent.rmdir()
        except OSError:
            logger.debug("%s holds other runs' checkpoints", self._folder.parent)

    def _newest_first(self) -> Iterator[Path]:
        folders = [folder for folder in self._folder.glob("checkpoint-*") if folder.name[11:].isdigit()]
        yield from sorted(folders, key=lambda folder: int(folder.name[11:]), reverse=True)

    def _prune(self) -> None:
        if self._limit > 0:
            for folder in list(self._newest_first())[self._limit :]:
                shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path) -> Snapshot | None:
    """The checkpoint in ``folder``, or ``None`` and a warning if it is not complete."""
    try:
        manifest = Manifest.model_validate_json((folder / _MANIFEST).read_bytes())
        for entry in manifest.files:
            if sha256_of(folder / entry.path) != entry.sha256:
                raise ValueError(f"{entry.path} does not match its checksum")
        weights, averages = load_file(folder / _WEIGHTS), load_file(folder / _AVERAGES)
        optimizer = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        points = tuple(read_rows(folder, LOSSES_FILE, LossPoint))
    except (OSError, ValidationError, ValueError) as error:
        logger.warning("Checkpoint %s is damaged or incomplete and is skipped: %s", folder, error)
        return None
    return Snapshot(manifest.step, weights, optimizer, points, averages)


def _flush(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
