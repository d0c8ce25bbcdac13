"""Counting a dataset's pictures for the plan: headers only, no pixels are decoded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kubetuner.config.data import PictureData
from kubetuner.config.schedule import stages
from kubetuner.config.sections import TrainSection
from kubetuner.errors import DatasetError, Problem, on_one_line

_NAMED = 5
Size = tuple[int, int]


@dataclass
class Measured:
    """What is in one dataset.

    Attributes:
        entry: The entry of the data file.
        root: The folder, absolute.
        revision: Hash of the listing.
        buckets: Target sizes (width, height) of the usable pictures, by bucket.
        skipped: Name and reason of pictures that cannot be used.
        unreadable: Those among them that are no pictures or damaged; the others are left out by limits.
    """

    entry: PictureData
    root: Path
    revision: str = ""
    buckets: dict[str, list[Size]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    exists: bool = True

    @property
    def id(self) -> str:
        """The entry's id."""
        return self.entry.source.id

    @property
    def samples(self) -> int:
        """Usable pictures."""
        return sum(len(sizes) for sizes in self.buckets.values())

    @property
    def trained_on(self) -> bool:
        """Whether the dataset is not held out."""
        return self.entry.source.dataset_type == "image"


def measure(entry: PictureData, cwd: Path, problems: list[Problem]) -> Measured:
    """Place every picture by its header; a missing folder or caption is appended to ``problems``."""
    from kubetuner.sources.local import list_pictures, listing_revision
    from kubetuner.sources.subset import subset

    root = (cwd / entry.source.instance_data_dir).expanduser().resolve()
    measured = Measured(entry, root)
    place = f"{entry.where}.instance_data_dir"
    if not root.is_dir():
        measured.exists = False
        problems.append(Problem(place, f"{root} is not a folder; create it or correct the path."))
        return measured
    try:
        pictures = subset(list_pictures(root), entry.source.id, entry.source.max_num_samples)
        measured.revision = listing_revision(root)
    except DatasetError as error:
        measured.exists = False
        problems.append(Problem(place, f"{error}."))
        return measured
    if not pictures:
        problems.append(Problem(place, f"{root} holds no pictures; put pictures there or correct the path."))
        measured.exists = False
        return measured
    for picture in pictures:
        _place(picture, measured)
    _check_captions(pictures, measured, problems)
    return measured


def _place(picture: Path, measured: Measured) -> None:
    from kubetuner.data import pictures
    from kubetuner.data.geometry import LeftOut, place
    from kubetuner.data.pictures import PictureError

    name = picture.relative_to(measured.root).as_posix()
    try:
        width, height = pictures.measure(picture)
    except PictureError as error:
        measured.skipped.append((name, error.reason))
        measured.unreadable.append(name)
        return
    placement = place(measured.entry.geometry.geometry, width, height, name)
    if isinstance(placement, LeftOut):
        measured.skipped.append((name, placement.reason))
    else:
        measured.buckets.setdefault(placement.bucket, []).append(placement.target_size)


def _check_captions(pictures: Sequence[Path], measured: Measured, problems: list[Problem]) -> None:
    source = measured.entry.source
    if source.caption_strategy != "textfile" or source.only_instance_prompt:
        return
    missing = [
        path.relative_to(measured.root).as_posix() for path in pictures if not path.with_suffix(".txt").is_file()
    ]
    if missing:
        named = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")
        message = f"is textfile, but {len(missing)} of {len(pictures)} pictures have no .txt file beside them: {named}."
        problems.append(Problem(f"{measured.entry.where}.caption_strategy", message))


def kept_buckets(measured: Measured, train: TrainSection) -> dict[str, int]:
    """Pictures, repeats counted, of the buckets that fill a batch; the others are never drawn from."""
    passes = measured.entry.sampling.repeats + 1
    counted = {name: len(sizes) * passes for name, sizes in measured.buckets.items()}
    return {name: count for name, count in counted.items() if count >= train.train_batch_size}


def drawn_per_epoch(measured: Measured, train: TrainSection) -> int:
    """Samples of a dataset that one epoch sees: whole batches, repeats counted."""
    size = train.train_batch_size
    return sum(count // size * size for count in kept_buckets(measured, train).values())


def bucket_problems(measured: Measured, train: TrainSection) -> list[Problem]:
    """Why a dataset cannot fill one effective batch, with the repeats or batch size that would."""
    if not measured.exists:
        return []
    where = measured.entry.where
    if not measured.samples:
        reasons = "; ".join(f"{on_one_line(name)}: {reason}" for name, reason in measured.skipped[:_NAMED])
        return [Problem(where, f"none of its {len(measured.skipped)} pictures is usable ({reasons}).")]
    effective = train.train_batch_size * train.gradient_accumulation_steps
    if not measured.trained_on or drawn_per_epoch(measured, train) >= effective:
        return []
    repeats = measured.entry.sampling.repeats
    lines = [
        f"bucket {name} ({sizes[0][0]}x{sizes[0][1]}): {len(sizes)} x ({repeats} + 1) = {len(sizes) * (repeats + 1)}, "
        f"needs repeats {max(math.ceil(effective / len(sizes)) - 1, 0)}"
        for name, sizes in sorted(measured.buckets.items())
    ]
    fullest = max(len(sizes) for sizes in measured.buckets.values())
    needed = max(math.ceil(effective / fullest) - 1, 0)
    fitting = fullest * (repeats + 1) // train.gradient_accumulation_steps
    advice = f"set repeats to {needed}"
    if fitting:
        advice += f", or train_batch_size to {fitting}"
    elif train.gradient_accumulation_steps > 1:
        advice += f", or train_batch_size to 1 and gradient_accumulation_steps to {fullest * (repeats + 1)}"
    if not measured.entry.repeats_set:
        advice += ", or allow_dataset_oversubscription to true in config.json"
    message = (
        f"one optimizer step needs train_batch_size {train.train_batch_size} x gradient_accumulation_steps "
        f"{train.gradient_accumulation_steps} = {effective} pictures in whole batches of "
        f"one bucket each, and there are too few: {'; '.join(lines)}. To fix it, {advice}."
    )
    return [Problem(f"{where}.repeats", message)]


def unreadable_problems(measured: Measured, most: float) -> list[Problem]:
    """More pictures than ``max_skipped_share`` cannot be read, so ``download_dataset`` would stop."""
    total = measured.samples + len(measured.skipped)
    lost = len(measured.unreadable)
    if not measured.samples or lost <= most * total:
        return []
    told = [f"{on_one_line(name)}: {reason}" for name, reason in measured.skipped if name in measured.unreadable]
    message = (
        f"{lost} of {total} pictures cannot be read ({'; '.join(told[:_NAMED])}); mend or remove them, or raise "
        f"max_skipped_share (now {most:g}) in config.json."
    )
    return [Problem(f"{measured.entry.where}.instance_data_dir", message)]


def steps_per_epoch(measured: Sequence[Measured], train: TrainSection) -> int:
    """Optimizer steps per epoch of the first step's datasets; each bucket's incomplete batch is dropped."""
    first = stages(train.datasets)[0].datasets
    batches = sum(drawn_per_epoch(one, train) // train.train_batch_size for one in measured if one.id in first)
    return max(math.ceil(batches / train.gradient_accumulation_steps), 1)
