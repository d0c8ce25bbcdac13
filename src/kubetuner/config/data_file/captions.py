"""``caption_filter_list`` of a text entry and ``caption_shuffle`` of a picture entry."""

import json
from collections.abc import Mapping
from pathlib import Path

from kubetuner.config.data_file.caption_filters import parse_filter
from kubetuner.config.keys import Key, Schema, Values, one_of, read
from kubetuner.config.sections.captions import CaptionShuffle
from kubetuner.errors import Problem

_SHUFFLE_SCHEMA = Schema(
    rules={
        "enable": Key("bool"),
        "count": Key("int", low=1),
        "seed": Key("int", low=0),
        "split_on": Key("str", one_of("comma", "space", "period")),
        "position_start": Key("int", low=0),
        "include_original": Key("bool"),
    }
)


def read_filters(values: Values, where: str, cwd: Path, problems: list[Problem]) -> tuple[str, ...]:
    """The entries of ``caption_filter_list``: a list, or the path of a JSON file or of a text file, one a line.

    Args:
        values: Values of an entry with ``dataset_type`` text_embeds.
        where: File and index for messages.
        cwd: Folder that a path is relative to.
        problems: Receives one entry per fault.
    """
    place = f"{where}.caption_filter_list"
    given = values.json("caption_filter_list")
    if isinstance(given, str):
        given = _read_file(given, place, cwd, problems) if given else []
    if not isinstance(given, list | None):
        problems.append(Problem(place, f"is a {type(given).__name__}; expected a list of strings or a path."))
        return ()
    entries = []
    for entry in given or []:
        try:
            if not isinstance(entry, str):
                raise ValueError("is not a string")
            parse_filter(entry)
        except ValueError as fault:
            problems.append(Problem(place, f"holds {entry!r}, which {fault}."))
        else:
            entries.append(entry)
    return tuple(entry for entry in entries if entry.strip())


def _read_file(name: str, place: str, cwd: Path, problems: list[Problem]) -> object:
    path = cwd / name
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if path.suffix == ".json" else text.split("\n")
    except OSError as error:
        problems.append(Problem(place, f"{path} cannot be read ({error.strerror}); expected a list or a file."))
    except ValueError as error:
        problems.append(Problem(place, f"{path} cannot be read ({error})."))
    return []


def read_shuffle(values: Values, where: str, seed: int, problems: list[Problem]) -> CaptionShuffle | None:
    """``caption_shuffle``; ``None`` where it is not set or not enabled.

    Args:
        values: Values of an entry with pictures.
        where: File and index for messages.
        seed: ``seed`` of the run, used where the entry sets none.
        problems: Receives one entry per fault.
    """
    given = values.json("caption_shuffle")
    if given is None:
        return None
    place = f"{where}.caption_shuffle"
    if not isinstance(given, Mapping):
        message = 'expected an object such as {"enable": true, "count": 3, "split_on": "comma"}.'
        problems.append(Problem(place, f"is {given!r}; {message}"))
        return None
    before = len(problems)
    found = read({str(name): value for name, value in given.items()}, _SHUFFLE_SCHEMA, place, problems)
    if not found.flag("enable") or len(problems) > before:
        return None
    chosen = found.pick("count", "split_on", "position_start", "include_original")
    return CaptionShuffle.model_validate({**chosen, "seed": found.integer("seed", seed)})
