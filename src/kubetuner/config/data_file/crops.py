"""The crop and aspect ratio keys of a picture entry, checked against each other."""

import math
from collections.abc import Mapping

from kubetuner.config.keys import Values
from kubetuner.errors import Problem

_CHOOSING = ("closest", "random")
_SQUARE = 1.0


def read_crop(values: Values, where: str, problems: list[Problem], notes: list[str]) -> dict[str, object]:
    """The fields of ``Geometry`` that say how pictures are cropped and which aspect ratios are left out.

    Args:
        values: The entry's values.
        where: File and index for messages.
        problems: Receives one entry per fault.
        notes: Receives what was accepted without effect.
    """
    crop, aspect = values.flag("crop"), values.text("crop_aspect", "square")
    choosing = aspect in _CHOOSING
    if choosing and not crop:
        problems.append(Problem(f"{where}.crop_aspect", f"is {aspect!r}, which needs crop; set crop to true."))
    if not crop:
        without = ("crop_aspect",) if not choosing else ()
        notes.extend(
            f"{where}.`{name}`: without crop, pictures keep their aspect ratio and are never cut from a larger one"
            for name in (*without, "maximum_image_size")
            if name in values
        )
    buckets = _read_buckets(values, aspect, where, problems)
    _check_limits(values, crop and aspect == "square", where, problems, notes)
    return {
        **values.pick("crop", "crop_style", "crop_aspect", "minimum_aspect_ratio", "maximum_aspect_ratio"),
        "crop_aspect_buckets": buckets,
    }


def _read_buckets(values: Values, aspect: str, where: str, problems: list[Problem]) -> tuple[tuple[float, float], ...]:
    """``crop_aspect_buckets``: numbers, or objects with ``aspect`` and ``weight`` whose weights add up to 1."""
    place = f"{where}.crop_aspect_buckets"
    given = values.json("crop_aspect_buckets")
    if aspect not in _CHOOSING:
        if given not in (None, []):
            problems.append(Problem(place, "would not be used; set crop_aspect to closest or random."))
        return ()
    if not isinstance(given, list) or not given:
        got = "missing" if given is None else repr(given)
        problems.append(Problem(place, f"is {got}; crop_aspect {aspect!r} needs a list such as [0.75, 1.0, 1.5]."))
        return ()
    numbers = [float(item) for item in given if _is_positive(item)]
    if len(numbers) == len(given):
        return tuple((number, 1.0) for number in numbers)
    weighted = [item for item in given if isinstance(item, Mapping) and _is_weighted(item)]
    if len(weighted) < len(given):
        message = (
            'expected numbers above 0 such as 1.5 (width / height), or objects such as {"aspect": 1.5, "weight": 0.5}, '
            "and not a mixture."
        )
        problems.append(Problem(place, message))
        return ()
    total = math.fsum(item["weight"] for item in weighted)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        problems.append(Problem(place, f"has weights that add up to {total:g}; expected 1."))
    return tuple((float(item["aspect"]), float(item["weight"])) for item in weighted)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_weighted(item: Mapping[str, object]) -> bool:
    weight = item.get("weight")
    return (
        item.keys() == {"aspect", "weight"} and _is_positive(item["aspect"]) and (weight == 0 or _is_positive(weight))
    )


def _check_limits(values: Values, square: bool, where: str, problems: list[Problem], notes: list[str]) -> None:
    least = values.number("minimum_aspect_ratio", 0.0)
    most = values.number("maximum_aspect_ratio", math.inf)
    if least > most:
        message = f"is {least:g}, above maximum_aspect_ratio {most:g}; no picture fits."
        problems.append(Problem(f"{where}.minimum_aspect_ratio", message))
        return
    for name, fits in (("minimum_aspect_ratio", least <= _SQUARE), ("maximum_aspect_ratio", most >= _SQUARE)):
        if not square or name not in values:
            continue
        if not fits:
            message = "leaves out every picture: square crops all have aspect ratio 1; set crop_aspect to preserve."
            problems.append(Problem(f"{where}.{name}", message))
        else:
            notes.append(f"{where}.`{name}`: it judges buckets, and with square crops all pictures are in bucket 1.0")
