"""Entries of masks (``dataset_type: conditioning``), and which dataset of pictures each belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kubetuner.config.data_file.sources import read_storage
from kubetuner.config.keys import Values
from kubetuner.config.sections.sources import DatasetSource, MaskSource
from kubetuner.errors import Problem

_PLACE = "conditioning_data"


@dataclass(frozen=True)
class MaskData:
    """One enabled entry that holds masks.

    Attributes:
        where: File and index, for messages.
        masks: Where they come from and whose they are.
    """

    where: str
    masks: MaskSource

    @property
    def id(self) -> str:
        """The entry's id."""
        return self.masks.source.id


@dataclass
class MaskLinks:
    """The entries of masks, and what names them.

    Attributes:
        entries: By id.
        named: Id of a dataset of pictures → its place in the file and the id of its masks.
    """

    entries: dict[str, MaskData] = field(default_factory=dict)
    named: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, values: Values, where: str, problems: list[Problem]) -> None:
        """Read an entry of masks."""
        before = len(problems)
        storage = read_storage(values, Values({}), where, problems)
        if not values.text("conditioning_type") and not _told(problems, f"{where}.conditioning_type"):
            message = "is missing; expected 'mask' (brightness is weight) or 'segmentation' (all but black counts)."
            problems.append(Problem(f"{where}.conditioning_type", message))
        name, kind = values.text("id"), values.text("conditioning_type")
        if len(problems) == before and name and kind:
            source = DatasetSource.model_validate({"id": name, **storage})
            masks = MaskSource.model_validate({"source": source, "kind": kind, "of": ()})
            self.entries[name] = MaskData(where, masks)

    def note(self, values: Values, where: str, problems: list[Problem]) -> None:
        """Remember which masks an entry of pictures names."""
        names = values.texts(_PLACE)
        if not names:
            return
        if values.text("dataset_type") == "eval":
            message = "has no meaning with dataset_type eval: the evaluation loss never applies masks; remove it."
            problems.append(Problem(f"{where}.{_PLACE}", message))
        elif len(names) > 1:
            message = f"names {', '.join(names)}; a picture has one mask, so name one entry of masks."
            problems.append(Problem(f"{where}.{_PLACE}", message))
        else:
            self.named[values.text("id")] = (where, names[0])

    def linked(self, ids: Mapping[str, str], problems: list[Problem]) -> tuple[MaskData, ...]:
        """Every entry of masks with the pictures it belongs to; ``ids`` are all ids, for messages."""
        for where, name in self.named.values():
            if name not in self.entries and not _told(problems, ids.get(name, " ")):
                message = f"names {name!r}, but no enabled entry with dataset_type conditioning has that id."
                problems.append(Problem(f"{where}.{_PLACE}", message))
        found = []
        for name, entry in self.entries.items():
            of = tuple(dataset for dataset, (_, masks) in self.named.items() if masks == name)
            if not of:
                message = f"{name!r} is in no dataset's conditioning_data, so it would not be used; name or disable it."
                problems.append(Problem(entry.where, message))
            found.append(replace(entry, masks=entry.masks.model_copy(update={"of": of})))
        return tuple(found)


def _told(problems: list[Problem], place: str) -> list[Problem]:
    """The problems already told of that place."""
    return [problem for problem in problems if problem.where.startswith(place)]
