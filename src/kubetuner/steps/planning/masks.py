"""Looking at masks for the plan: which pictures have none, and which masks do not fit; headers only."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from kubetuner.config.data_file.masks import MaskData
from kubetuner.config.sections.sources import Composite, MaskSource
from kubetuner.errors import DatasetError, Problem, on_one_line
from kubetuner.sources.base import Item, Listing, Source, named
from kubetuner.sources.filters import KEY as FILTER_KEY
from kubetuner.sources.filters import FilterError, describe, nothing_left
from kubetuner.sources.switch import located, open_source
from kubetuner.steps.planning.datasets import Size, sample_size
from kubetuner.threads import in_threads

_NAMED = 5


@dataclass
class _Theirs:
    """The masks of one dataset's pictures.

    Attributes:
        found: Mask and its size, or why it has none, by picture.
        fitting: Pictures whose mask can be used; ``resized`` of them have a mask of another size than their own.
        missing: Pictures without a mask.
        misfits: Why masks cannot be laid over their pictures.
        unused: Masks without a picture.
    """

    source: Source
    listing: Listing
    composite: Composite | None = None
    found: dict[str, tuple[str, Size | str]] = field(default_factory=dict)
    fitting: int = 0
    resized: int = 0
    missing: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    unused: tuple[str, ...] = ()
    doubled: str = ""

    def look(self, pictures: Sequence[Item]) -> None:
        """Find and measure the masks of ``pictures``."""
        from kubetuner.data.masks import pair

        try:
            pairs = pair(pictures, self.listing.pictures)
        except DatasetError as error:
            self.doubled = str(error)
            return
        self.unused = pairs.unused
        names, items = list(pairs.masks), list(pairs.masks.values())
        sizes = in_threads(
            lambda item: sample_size(self.source, item, self.composite), items, self.source.readers, "masks"
        )
        self.found = {name: (item.name, size) for name, item, size in zip(names, items, sizes, strict=True)}

    def refusal(self, picture: str, size: Size) -> str:
        """Why the picture cannot be used: its mask cannot be read. Missing masks and misfits are noted."""
        from kubetuner.data.masks import misfit

        if self.doubled:
            return ""
        if picture not in self.found:
            self.missing.append(picture)
            return ""
        name, own = self.found[picture]
        if isinstance(own, str):
            return f"its mask {on_one_line(name)}: {own}"
        if wrong := misfit(own, size):
            self.misfits.append(f"{on_one_line(picture)}: {wrong}")
        self.fitting += not wrong
        self.resized += not wrong and own != size
        return ""


@dataclass
class PlannedMasks:
    """All masks of a run.

    Attributes:
        sources: As the plan found them: local paths absolute, with the revision and newest file of the listing.
        theirs: By the id of the dataset of pictures.
    """

    sources: list[MaskSource] = field(default_factory=list)
    theirs: dict[str, _Theirs] = field(default_factory=dict)

    def problems(self, entries: Sequence[MaskData]) -> list[Problem]:
        """What is wrong with the masks, when the pictures have been measured."""
        found = []
        for entry, dataset in _each(entries):
            masks = self.theirs.get(dataset)
            if masks is None:
                continue
            if masks.doubled:
                found.append(Problem(entry.where, f"{masks.doubled}."))
            if masks.missing:
                pictures = f"{len(masks.missing)} of the pictures of {dataset!r}"
                message = (
                    f"has no masks for {pictures}: {on_one_line(named(masks.missing))}. A picture without its mask "
                    "would be learned in full: give each a mask of the same name (all white where all of it counts), "
                    "or keep such pictures in an entry without conditioning_data."
                )
                found.append(Problem(entry.where, message))
            if masks.misfits:
                more = f"; and {len(masks.misfits) - _NAMED} more" if len(masks.misfits) > _NAMED else ""
                message = f"has masks of another shape than their pictures: {'; '.join(masks.misfits[:_NAMED])}{more}."
                found.append(Problem(entry.where, message))
        return found

    def remarks(self, entries: Sequence[MaskData]) -> list[str]:
        """Sentences for the plan's page."""
        found = []
        for entry, dataset in _each(entries):
            masks = self.theirs[dataset]
            text = f"`{entry.id}` ({entry.masks.kind}): masks for all {masks.fitting} pictures of `{dataset}`"
            if masks.resized:
                text += f"; {masks.resized} of another size are resized with their pictures"
            if masks.listing.filtered:
                text += f"; {FILTER_KEY} leaves out {describe(masks.listing.filtered)}"
            if masks.unused:
                text += f"; {len(masks.unused)} without a picture are left out: {on_one_line(named(masks.unused))}"
            found.append(text)
        return found


def open_masks(entries: Sequence[MaskData], cwd: Path, stack: ExitStack, problems: list[Problem]) -> PlannedMasks:
    """List every entry of masks; ``stack`` closes the sources, what is wrong with them goes to ``problems``."""
    planned = PlannedMasks()
    for entry in entries:
        settings = located(entry.masks.source, cwd)
        place = entry.where
        try:
            source = stack.enter_context(closing(open_source(settings)))
            place = f"{entry.where}.{source.key}"
            listing = source.listing()
        except DatasetError as error:
            place = f"{entry.where}.{FILTER_KEY}" if isinstance(error, FilterError) else place
            problems.append(Problem(place, f"{error}."))
            continue
        if nothing := nothing_left(listing, source.place):
            problems.append(Problem(f"{entry.where}.{FILTER_KEY}", f"{nothing}."))
            continue
        if not listing.pictures:
            problems.append(Problem(place, f"{source.place} holds no masks; put them there or correct the path."))
            continue
        pinned = settings.model_copy(update={"revision": listing.revision, "newest": listing.newest})
        planned.sources.append(entry.masks.model_copy(update={"source": pinned}))
        planned.theirs |= {dataset: _Theirs(source, listing, settings.composite) for dataset in entry.masks.of}
    return planned


def _each(entries: Sequence[MaskData]) -> list[tuple[MaskData, str]]:
    return [(entry, dataset) for entry in entries for dataset in entry.masks.of]
