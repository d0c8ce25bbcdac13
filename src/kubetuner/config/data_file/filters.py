"""``filter_func`` and ``composite_image_config``: which pictures of a source are samples, and which part of each."""

import math
import re
from collections.abc import Mapping

from kubetuner.config.data_file.keys import COMPOSITE_SCHEMA, FILTER_PATH_SCHEMA, FILTER_SCHEMA
from kubetuner.config.keys import Schema, Values, read
from kubetuner.config.sections.sources import Composite, PathFilter, RowFilter
from kubetuner.errors import Problem

_FILTER, _COMPOSITE = "filter_func", "composite_image_config"
# Their names in the object ``path``, and beside it.
_PATHS = {"include": "path_include", "exclude": "path_exclude", "mode": "path_match"}
# What measures the pictures themselves, for sources that have no columns.
_ELSEWHERE = {"min_width": "; minimum_image_size measures the pictures", "min_height": "; minimum_image_size does"}
_ROWS = ("collection", "quality_thresholds", "quality_column", "min_width", "min_height")


def read_filter(values: Values, where: str, problems: list[Problem]) -> dict[str, object]:
    """The fields ``paths`` and ``rows`` of ``DatasetSource``; ``None`` where nothing is filtered.

    Args:
        values: The entry's values.
        where: File and index for messages.
        problems: Receives one entry per fault.
    """
    place = f"{where}.{_FILTER}"
    found = _object(values, _FILTER, FILTER_SCHEMA, '{"path_exclude": ["*/drafts/*"]}', where, problems)
    if found is None:
        return {}
    kind = values.text("type", "local")
    for name in _ROWS if kind != "huggingface" else ():
        if name in found:
            message = f"reads a column of a hub dataset, and type is {kind}{_ELSEWHERE.get(name, '')}; remove it."
            problems.append(Problem(f"{place}.{name}", message))
    return {"paths": _read_paths(found, place, problems), "rows": _read_rows(found, place, problems)}


def read_composite(values: Values, where: str, problems: list[Problem]) -> Composite | None:
    """``composite_image_config``; ``None`` where it is not set or not enabled. Arguments as of :func:`read_filter`."""
    example = '{"enabled": true, "image_count": 2, "select_index": 0}'
    found = _object(values, _COMPOSITE, COMPOSITE_SCHEMA, example, where, problems)
    if found is None or not found.flag("enabled"):
        return None
    place = f"{where}.{_COMPOSITE}"
    count, index = found.integer("image_count", 0), found.integer("select_index", 0)
    if count < 2:
        got = f"is {count}" if "image_count" in found else "is missing"
        message = f"{got}; expected how many pictures stand side by side, at least 2 (or enabled false)."
        _tell(problems, f"{place}.image_count", message)
        return None
    if index >= count:
        message = f"is {index}; expected at most {count - 1}, as the first of image_count {count} is 0."
        problems.append(Problem(f"{place}.select_index", message))
    return Composite(count=count, index=index)


def _object(
    values: Values, key: str, schema: Schema, example: str, where: str, problems: list[Problem]
) -> Values | None:
    given = values.json(key)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        problems.append(
            Problem(f"{where}.{key}", f"is a {type(given).__name__}; expected an object such as {example}.")
        )
        return None
    return read({str(name): value for name, value in given.items()}, schema, f"{where}.{key}", problems)


def _read_paths(found: Values, place: str, problems: list[Problem]) -> PathFilter | None:
    nested = _object(found, "path", FILTER_PATH_SCHEMA, '{"include": "*.png", "mode": "glob"}', place, problems)
    given, written = {}, {}
    for inner, flat in _PATHS.items():
        given[inner], written[inner] = found.texts(flat), f"{place}.{flat}"
        if nested is not None and inner in nested:
            if flat in found:
                problems.append(Problem(f"{place}.path.{inner}", f"is the same key as {flat!r}; keep one of them."))
            given[inner], written[inner] = nested.texts(inner), f"{place}.path.{inner}"
    # SimpleTuner's defaults, too, differ with the spelling.
    beside = any(flat in found for flat in _PATHS.values())
    match = "".join(given["mode"]) or ("auto" if beside else "contains")
    sides = {side: tuple(filter(None, given[side])) for side in ("include", "exclude")}
    for side, patterns in sides.items():
        faults = [f"holds {one!r}, which {fault}." for one in patterns if (fault := _pattern_fault(one, match))]
        problems.extend(Problem(written[side], fault) for fault in faults)
    if any(sides.values()):
        return PathFilter.model_validate({**sides, "match": match})
    if given["mode"]:
        _tell(problems, written["mode"], "would not be used; name patterns to include or exclude.")
    return None


def _pattern_fault(pattern: str, match: str) -> str:
    if match != "regex" and not (match == "auto" and pattern.startswith("re:")):
        return ""
    try:
        re.compile(pattern if match == "regex" else pattern[3:])
    except re.error as error:
        return f"is no regular expression ({error})"
    return ""


def _read_rows(found: Values, place: str, problems: list[Problem]) -> RowFilter | None:
    thresholds = _read_thresholds(found, place, problems)
    collection = _read_collection(found, place, problems)
    if "quality_column" in found and "quality_thresholds" not in found:
        _tell(problems, f"{place}.quality_column", "would not be used; set quality_thresholds.")
    if not thresholds and collection is None and "min_width" not in found and "min_height" not in found:
        return None
    return RowFilter.model_validate(
        {
            "collection": collection,
            "quality_thresholds": thresholds,
            **found.pick("quality_column", "min_width", "min_height"),
        }
    )


def _read_collection(found: Values, place: str, problems: list[Problem]) -> tuple[str | int, ...] | None:
    given = found.json("collection")
    if given is None:
        return None
    listed = given if isinstance(given, list) else [given]
    names = tuple(one for one in listed if isinstance(one, str | int) and not isinstance(one, bool))
    if not names or len(names) < len(listed):
        message = f"is {given!r}; expected a name or a list of names."
        problems.append(Problem(f"{place}.collection", message))
    return names


def _read_thresholds(found: Values, place: str, problems: list[Problem]) -> tuple[tuple[str, float], ...]:
    given = found.json("quality_thresholds")
    if given is None:
        return ()
    if not isinstance(given, Mapping) or not given:
        message = f'is {given!r}; expected an object such as {{"aesthetic": 5.5}}.'
        problems.append(Problem(f"{place}.quality_thresholds", message))
        return ()
    numbers = {
        str(name): float(least)
        for name, least in given.items()
        if isinstance(least, int | float) and not isinstance(least, bool) and math.isfinite(least)
    }
    problems.extend(
        Problem(f"{place}.quality_thresholds.{name}", f"is {least!r}; expected a number.")
        for name, least in given.items()
        if str(name) not in numbers
    )
    return tuple(numbers.items())


def _tell(problems: list[Problem], place: str, message: str) -> None:
    """Add a problem, unless there is one of that place."""
    if not any(problem.where == place for problem in problems):
        problems.append(Problem(place, message))
