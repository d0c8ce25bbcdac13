"""Counting a dataset's pictures for the plan: headers only, no pixels are decoded."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from kubetuner.config.data_file.entries import PictureData
from kubetuner.config.schedule import stages
from kubetuner.config.sections.sources import Composite, DatasetSource
from kubetuner.config.sections.steps import TrainSection
from kubetuner.errors import DatasetError, Problem, on_one_line
from kubetuner.progress import Progress
from kubetuner.sources.base import HEADER_BYTES, Filtered, Item, ItemError, Listing, Source, name_fault, named
from kubetuner.sources.filters import KEY as FILTER_KEY
from kubetuner.sources.filters import FilterError, nothing_left
from kubetuner.sources.subset import subset
from kubetuner.sources.switch import located, open_source
from kubetuner.steps.planning.advice import batches_of, fewest_passes, largest_batch
from kubetuner.steps.planning.told_sizes import doubt
from kubetuner.threads import in_threads

_NAMED = 5
Size = tuple[int, int]


@dataclass
class Measured:
    """What is in one dataset.

    Attributes:
        entry: The entry of the data file.
        source: Its source, with local paths absolute and the revision and newest file of the listing.
        buckets: How many of the usable pictures have which target size (width, height), by bucket.
        filtered: What ``filter_func`` has left out of the listing.
        doubted: Why the sizes that a table tells are not believed; empty where they are, or there is none.
        skipped: Name and reason of pictures that cannot be used.
        unreadable: Those among them that are damaged or lack a caption; the others are left out by limits.
    """

    entry: PictureData
    source: DatasetSource
    buckets: dict[str, Counter[Size]] = field(default_factory=dict)
    filtered: tuple[Filtered, ...] = ()
    doubted: str = ""
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
        return sum(sizes.total() for sizes in self.buckets.values())

    def lose(self, name: str, reason: str) -> None:
        """Leave out a picture that is none, damaged or without a caption."""
        self.skipped.append((name, reason))
        self.unreadable.append(name)

    @property
    def trained_on(self) -> bool:
        """Whether the dataset is not held out."""
        return self.entry.source.dataset_type == "image"


class Masks(Protocol):
    """The masks of a dataset's pictures; see :mod:`kubetuner.steps.planning.masks`."""

    def look(self, pictures: Sequence[Item]) -> None:
        """Find and measure the masks of ``pictures``."""

    def refusal(self, picture: str, size: Size) -> str:
        """Why a picture of ``size`` cannot be used with its mask, or nothing."""


def measure(entry: PictureData, cwd: Path, problems: list[Problem], masks: Masks | None = None) -> Measured:
    """Place every picture by its header; what is wrong with the source or its captions goes to ``problems``."""
    measured = Measured(entry, located(entry.source, cwd))
    try:
        with closing(open_source(measured.source)) as source:
            _measure(source, measured, problems, masks)
    except DatasetError as error:
        measured.exists = False
        problems.append(Problem(entry.where, f"{error}."))
    return measured


def _list(source: Source, measured: Measured, problems: list[Problem]) -> Listing | None:
    """The dataset's files, which ``measured`` is pinned to; ``None`` and a problem where there are none."""
    where = measured.entry.where
    try:
        listing = source.listing()
    except DatasetError as error:
        measured.exists = False
        key = FILTER_KEY if isinstance(error, FilterError) else source.key
        problems.append(Problem(f"{where}.{key}", f"{error}."))
        return None
    pinned = {"revision": listing.revision, "newest": listing.newest}
    measured.source = measured.source.model_copy(update=pinned)
    measured.filtered = listing.filtered
    if listing.pictures:
        return listing
    measured.exists = False
    message = f"{source.place} holds no pictures; put pictures there or correct the path."
    nothing = nothing_left(listing, source.place)
    key = FILTER_KEY if nothing else source.key
    problems.append(Problem(f"{where}.{key}", f"{nothing}." if nothing else message))
    return None


def _measure(source: Source, measured: Measured, problems: list[Problem], masks: Masks | None) -> None:
    from kubetuner.data.geometry import LeftOut, place

    listing = _list(source, measured, problems)
    if listing is None:
        return
    pictures = subset(listing.pictures, measured.id, measured.source.max_num_samples)
    if masks is not None:
        masks.look(pictures)
    composite = measured.source.composite
    if measured.source.metadata_table is not None:
        measured.doubted = doubt(pictures, lambda item: size_of(source, item))

    def sized(item: Item) -> Size | str:
        return sample_size(source, replace(item, pixels=None) if measured.doubted else item, composite)

    sizes = in_threads(sized, pictures, source.readers, "plan")
    with Progress(f"plan {measured.id}", len(pictures), "pictures") as progress:
        for item, size in zip(pictures, sizes, strict=True):
            progress.advance()
            without = _uncaptioned(source, measured, item)
            if isinstance(size, str) or without:
                measured.lose(item.name, size if isinstance(size, str) else without)
                continue
            placement = place(measured.entry.geometry.geometry, *size, item.name)
            if isinstance(placement, LeftOut):
                measured.skipped.append((item.name, placement.reason))
            elif masks is not None and (refusal := masks.refusal(item.name, size)):
                measured.lose(item.name, refusal)
            else:
                measured.buckets.setdefault(placement.bucket, Counter())[placement.target_size] += 1
    _check_captions(pictures, listing, measured, problems)


def sample_size(source: Source, item: Item, composite: Composite | None) -> Size | str:
    """The size of the upright picture, or of the one that is taken out of several, or why it has none."""
    from kubetuner.data.composites import tile_size
    from kubetuner.data.pictures import PictureError

    size = size_of(source, item)
    try:
        return size if isinstance(size, str) else tile_size(size, composite)
    except PictureError as error:
        return error.reason


def size_of(source: Source, item: Item) -> Size | str:
    """The upright picture's size, or why it has none."""
    from kubetuner.data.pictures import PictureError, measure

    if fault := name_fault(item.name):
        return fault
    if item.pixels:
        return item.pixels
    try:
        header = source.header(item, HEADER_BYTES)
        try:
            return measure(header)
        except PictureError:
            if len(header) != HEADER_BYTES or len(header) == item.size:
                raise
        # Long metadata before the size, or a format that says it at the end.
        return measure(source.read(item))
    except (ItemError, PictureError) as error:
        return error.reason


def _uncaptioned(source: Source, measured: Measured, item: Item) -> str:
    """Why a picture is left out for want of a caption: SimpleTuner, too, leaves out what the table does not know."""
    from kubetuner.data.captions import caption_fault

    settings = measured.source
    if settings.only_instance_prompt or settings.caption_strategy in ("filename", "textfile", "instanceprompt"):
        return ""
    return caption_fault(settings, item, source)


def _check_captions(pictures: Sequence[Item], listing: Listing, measured: Measured, problems: list[Problem]) -> None:
    from kubetuner.data.captions import text_name

    settings = measured.source
    where = f"{measured.entry.where}.caption_strategy"
    if settings.only_instance_prompt or settings.caption_strategy != "textfile":
        return
    missing = [item.name for item in pictures if text_name(item) not in listing.texts]
    if missing:
        of = f"{len(missing)} of {len(pictures)} pictures"
        problems.append(Problem(where, f"is textfile, but {of} have no .txt file beside them: {named(missing)}."))


def kept_buckets(measured: Measured, train: TrainSection) -> dict[str, int]:
    """Pictures, repeats counted, of the buckets that fill a batch; the others are never drawn from."""
    passes = measured.entry.sampling.repeats + 1
    counted = {name: sizes.total() * passes for name, sizes in measured.buckets.items()}
    return {name: count for name, count in counted.items() if count >= train.batch_size(measured.entry.sampling)}


def batches_per_epoch(measured: Measured, train: TrainSection) -> int:
    """Batches of a dataset in one epoch: those of each bucket that are whole, repeats counted."""
    return batches_of(list(kept_buckets(measured, train).values()), train.batch_size(measured.entry.sampling))


def drawn_per_epoch(measured: Measured, train: TrainSection) -> int:
    """Samples of a dataset that one epoch sees."""
    return batches_per_epoch(measured, train) * train.batch_size(measured.entry.sampling)


def bucket_problems(measured: Measured, train: TrainSection) -> list[Problem]:
    """Why a dataset cannot fill one effective batch, with the repeats or batch size that would."""
    if not measured.exists:
        return []
    where = measured.entry.where
    if not measured.samples:
        reasons = "; ".join(f"{on_one_line(name)}: {reason}" for name, reason in measured.skipped[:_NAMED])
        return [Problem(where, f"none of its {len(measured.skipped)} pictures is usable ({reasons}).")]
    if not measured.trained_on or batches_per_epoch(measured, train) >= train.planned_micro_steps:
        return []
    sampling = measured.entry.sampling
    repeats, size = sampling.repeats, train.batch_size(sampling)
    effective = size * train.planned_micro_steps
    lines = []
    for name, sizes in sorted(measured.buckets.items()):
        (width, height), count = next(iter(sizes)), sizes.total()
        lines.append(
            f"bucket {name} ({width}x{height}): {count} x ({repeats} + 1) = {count * (repeats + 1)}, "
            f"needs repeats {max(math.ceil(effective / count) - 1, 0)}"
        )
    counts = [sizes.total() for sizes in measured.buckets.values()]
    needed = fewest_passes(counts, size, train.planned_micro_steps) - 1
    repeated = [count * (repeats + 1) for count in counts]
    fitting = largest_batch(repeated, train.planned_micro_steps)
    advice = f"set repeats to {needed}"
    most = sum(repeated) // train.planned_processes
    its = "its " if sampling.train_batch_size else ""
    if fitting:
        advice += f", or {its}train_batch_size to {fitting}"
    elif 0 < most < train.gradient_accumulation_steps:
        advice += f", or {its}train_batch_size to 1 and gradient_accumulation_steps to {most}"
    if not measured.entry.repeats_set:
        advice += ", or allow_dataset_oversubscription to true in config.json"
    message = (
        f"one optimizer step needs train_batch_size {size} x gradient_accumulation_steps "
        f"{train.gradient_accumulation_steps}{_times_processes(train)} = {effective} pictures in whole batches of "
        f"one bucket each, and there are too few: {'; '.join(lines)}. To fix it, {advice}."
    )
    return [Problem(f"{where}.repeats", message)]


def _times_processes(train: TrainSection) -> str:
    named = {"num_train_processes": train.num_train_processes, "num_machines": train.num_machines}
    return "".join(f" x {name} {count}" for name, count in named.items() if count > 1)


def unreadable_problems(measured: Measured, most: float) -> list[Problem]:
    """More pictures than ``max_skipped_share`` cannot be used, so ``download_dataset`` would stop."""
    total = measured.samples + len(measured.skipped)
    lost = len(measured.unreadable)
    if not measured.samples or lost <= most * total:
        return []
    first = measured.unreadable[:_NAMED]
    told = [f"{on_one_line(name)}: {reason}" for name, reason in measured.skipped if name in first]
    message = (
        f"{lost} of {total} pictures cannot be used ({'; '.join(told)}); mend or remove them, or raise "
        f"max_skipped_share (now {most:g}) in config.json."
    )
    return [Problem(measured.entry.where, message)]


def steps_per_epoch(measured: Sequence[Measured], train: TrainSection) -> int:
    """Optimizer steps per epoch of the first step's datasets; each bucket's incomplete batch is dropped."""
    first = stages(train.datasets)[0].datasets
    batches = sum(batches_per_epoch(one, train) for one in measured if one.id in first)
    return max(math.ceil(batches / train.planned_micro_steps), 1)
