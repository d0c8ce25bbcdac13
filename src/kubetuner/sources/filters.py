"""``filter_func``: which pictures of a source are taken in, decided by names and columns before anything is fetched."""

import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from kubetuner.config.sections.sources import DatasetSource, PathFilter, RowFilter
from kubetuner.errors import DatasetError, on_one_line
from kubetuner.sources.base import Filtered, Item, Listing, Source, listing_of
from kubetuner.sources.items import Items
from kubetuner.sources.relisted import Relisted

KEY = "filter_func"
NAME_COLUMNS = ("file_name", "filename", "path")
"""Columns of a row that name its picture, beside the path that the picture itself may hold."""
_COLLECTION = "collection"
_SIZES = ("width", "height")
_REASONS, _NAMES, _LONGEST = 5, 3, 40


class FilterError(DatasetError):
    """A filter that cannot be applied to what the source holds."""


class Tally:
    """Counts what a filter leaves out, by reason."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """One more picture; ``name`` may be empty."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        names = self._names.setdefault(reason, [])
        if len(names) < _NAMES and name:
            names.append(name)

    def result(self) -> tuple[Filtered, ...]:
        """For :attr:`Listing.filtered`."""
        order = sorted(self._counts, key=lambda reason: -self._counts[reason])
        return tuple(Filtered(reason, self._counts[reason], tuple(self._names[reason])) for reason in order)


def describe(filtered: Sequence[Filtered]) -> str:
    """The reasons with their counts and first pictures, for a message: "2 by path_exclude (a.png, b.png)"."""
    shown = []
    for one in filtered[:_REASONS]:
        names = ", ".join(map(on_one_line, one.names))
        more = ", …" if one.count > len(one.names) else ""
        shown.append(f"{one.count} by {one.reason} ({names}{more})" if names else f"{one.count} by {one.reason}")
    rest = sum(one.count for one in filtered[_REASONS:])
    return ", ".join([*shown, *([f"{rest} for {len(filtered) - _REASONS} other reasons"] if rest else [])])


def nothing_left(listing: Listing, place: str) -> str:
    """What to say where a filter leaves nothing of ``place``; empty where it leaves something, or there is none."""
    if listing.pictures or not listing.filtered:
        return ""
    count = sum(one.count for one in listing.filtered)
    return f"leaves out all {count} pictures of {place}: {describe(listing.filtered)}; loosen or correct it"


class NameTest:
    """A :class:`PathFilter` that is ready to be asked."""

    def __init__(self, settings: PathFilter) -> None:
        self._include = [_matcher(pattern, settings.match) for pattern in settings.include]
        self._exclude = [_matcher(pattern, settings.match) for pattern in settings.exclude]

    def refusal(self, names: Iterable[str]) -> str:
        """Which key leaves out a picture that has these names, or nothing."""
        paths = dict.fromkeys(names)
        every = dict.fromkeys(text for path in paths for text in (path, path.rpartition("/")[2]))
        if self._include and not any(matches(text) for matches in self._include for text in every):
            return "path_include"
        return "path_exclude" if any(matches(text) for matches in self._exclude for text in every) else ""


def _matcher(pattern: str, match: str) -> Callable[[str], bool]:
    if match == "auto":
        match = "glob" if re.search(r"[*?]", pattern) else "contains"
        if pattern.startswith("re:"):
            match, pattern = "regex", pattern[3:]
    if match == "contains":
        return lambda text: pattern in text
    if match == "exact":
        return lambda text: text == pattern
    if match == "glob":
        return lambda text: fnmatch.fnmatchcase(text, pattern)
    found = re.compile(pattern)
    return lambda text: found.search(text) is not None


def filtered_by_name(listing: Listing, refusal: Callable[[Item], str], revision: str = "") -> Listing:
    """``listing`` without the pictures that ``refusal`` gives a reason for; ``revision`` as of :func:`listing_of`."""
    tally, kept = Tally(), Items()
    for item in listing.pictures:
        try:
            reason = refusal(item)
        except FilterError as error:
            raise FilterError(f"{item.name}: {error}") from error
        if reason:
            tally.add(reason, item.name)
        else:
            kept.append(item)
    return replace(listing_of(kept, listing.texts.values(), revision), filtered=tally.result())


class FilteredByName(Relisted):
    """``source`` with the pictures alone whose names ``paths`` lets through.

    Pictures that are left out do not count for the revision, so they may change without another download.
    """

    def __init__(self, source: Source, paths: PathFilter) -> None:
        super().__init__(source)
        self._names = NameTest(paths)

    def listing(self) -> Listing:
        """See :class:`Source`."""
        return filtered_by_name(self._source.listing(), lambda item: self._names.refusal([item.name]))


class RowTest:
    """Both filters of a hub dataset, for pictures that are rows of a table."""

    def __init__(self, settings: DatasetSource) -> None:
        self._names = NameTest(settings.paths) if settings.paths else None
        self._rows = settings.rows

    @property
    def active(self) -> bool:
        """Whether anything is filtered at all."""
        return self._names is not None or self._rows is not None

    @property
    def by_name(self) -> bool:
        """Whether a picture's names decide."""
        return self._names is not None

    @property
    def columns(self) -> dict[str, str]:
        """The columns that must be there, and the key that wants each."""
        rows = self._rows
        if rows is None:
            return {}
        found = {_COLLECTION: _COLLECTION} if rows.collection is not None else {}
        found |= {rows.quality_column: "quality_thresholds"} if rows.quality_thresholds else {}
        found |= {name: f"min_{name}" for name in _SIZES if _least(rows, name)}
        return {name: f"{KEY}.{key}" for name, key in found.items()}

    def refusal(self, names: Iterable[str], row: Mapping[str, object]) -> str:
        """Why a row is left out, or nothing.

        Args:
            names: What its picture is called.
            row: Its :attr:`columns`; ``None`` for what is not known.

        Raises:
            FilterError: Columns hold something else than what is compared.
        """
        reasons, faults = [], list[str]()
        if self._names is not None:
            reasons.append(self._names.refusal(names))
        if self._rows is not None:
            reasons += [
                _collection(self._rows, row),
                *_quality(self._rows, row, faults),
                *_sizes(self._rows, row, faults),
            ]
        if faults:
            raise FilterError("; ".join(faults))
        return next(filter(None, reasons), "")


def _collection(rows: RowFilter, row: Mapping[str, object]) -> str:
    if rows.collection is None:
        return ""
    value = row.get(_COLLECTION)
    own = value if isinstance(value, list) else [value]
    return "" if any(one in rows.collection for one in own) else f"{_COLLECTION} {_show(value)}"


def _quality(rows: RowFilter, row: Mapping[str, object], faults: list[str]) -> list[str]:
    """Why a row's quality is too low."""
    if not rows.quality_thresholds:
        return []
    quality, column = row.get(rows.quality_column), rows.quality_column
    if quality is None:
        return [f"quality_thresholds, as {column} is empty"]
    if not isinstance(quality, Mapping):
        faults.append(f"column {column!r} holds {_show(quality)}; {KEY}.quality_thresholds needs an object of numbers")
        return []
    reasons = []
    for name, least in rows.quality_thresholds:
        value = quality.get(name)
        if name not in quality:
            reasons.append(f"quality_thresholds, as {column} has no {name!r} (it has {', '.join(map(str, quality))})")
        elif _below(value, least, f"{column}.{name}", f"quality_thresholds.{name}", faults):
            reasons.append(f"quality_thresholds.{name}")
    return reasons


def _sizes(rows: RowFilter, row: Mapping[str, object], faults: list[str]) -> list[str]:
    """Why a row says that its picture is too small."""
    least = {name: _least(rows, name) for name in _SIZES}
    return [
        f"min_{name}"
        for name in _SIZES
        if least[name] and _below(row.get(name), least[name], name, f"min_{name}", faults)
    ]


def _least(rows: RowFilter, name: str) -> int:
    return rows.min_width if name == "width" else rows.min_height


def _below(value: object, least: float, column: str, key: str, faults: list[str]) -> bool:
    """Whether ``value`` is smaller than ``least`` or not known; what is no number, nor written like one, is a fault."""
    if value is None or value == "":
        return True
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None:
        faults.append(f"column {column!r} holds {_show(value)}; {KEY}.{key} needs numbers")
        return False
    return not number >= least  # NaN, too, is left out


def _show(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
