"""Validation prompts and resolutions, and Sana's instruction."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from kubetuner.config.keys import Values
from kubetuner.config.models import FamilyOutline
from kubetuner.config.sections.steps import Prompt
from kubetuner.errors import Problem

INSTRUCTION = "\n".join(
    (
        "Rewrite the short request after the last colon as one vivid description of a single picture.",
        "- Keep every subject, number, colour and place that the request names, and contradict none of them.",
        "- Where the request is silent, choose light, viewpoint, materials and surroundings that fit it.",
        "- Leave requests that are detailed already as they are.",
        "Answer with the description alone. Request:",
    )
)
"""Put before captions for Sana unless ``sana_complex_human_instruction`` says otherwise.

Sana was trained with a fixed instruction of its authors' before each prompt. That text is theirs and not repeated
here; this one is our own and asks for the same kind of rewriting. Where exactly that text matters, give the
original as a string, a list of lines or a file; and ``""`` for no instruction.
"""

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")


def read_prompts(values: Values, where: str, cwd: Path, problems: list[Problem]) -> tuple[Prompt, ...]:
    """The prompts of ``user_prompt_library``, then ``validation_prompt`` under the name ``validation``."""
    library = _library(values, where, cwd, problems)
    prompts = [Prompt(shortname=name, prompt=text) for name, text in library.items()]
    if text := values.text("validation_prompt"):
        if "validation" in library:
            message = "is named 'validation', and so is a prompt of user_prompt_library; rename the latter."
            problems.append(Problem(f"{where}.validation_prompt", message))
        prompts.append(Prompt(shortname="validation", prompt=text))
    return tuple(prompts)


def _library(values: Values, where: str, cwd: Path, problems: list[Problem]) -> Mapping[str, str]:
    given = values.get("user_prompt_library")
    place = f"{where}.user_prompt_library"
    library: object = given
    if isinstance(given, str):
        if not given:
            return {}
        path = cwd / given
        try:
            library = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            problems.append(
                Problem(place, f"{path} cannot be read ({error.strerror}); expected a JSON file of prompts.")
            )
            return {}
        except ValueError as error:
            problems.append(Problem(place, f"{path} is not JSON ({error})."))
            return {}
    if library is None:
        return {}
    if not isinstance(library, Mapping):
        problems.append(Problem(place, "holds no object; expected {shortname: prompt}."))
        return {}
    found = {}
    for name, text in library.items():
        if not isinstance(text, str) or not text:
            problems.append(Problem(place, f"{name!r} is not a text; expected {{shortname: prompt}}."))
        elif not name or "/" in name or "\\" in name:
            problems.append(Problem(place, f"{name!r} cannot name a picture file; use a name without slashes."))
        else:
            found[str(name)] = text
    return found


def read_resolutions(
    values: Values, where: str, family: FamilyOutline, problems: list[Problem]
) -> tuple[tuple[int, int], ...] | None:
    """``"1024x1024,1280x768"`` (width first) or an edge; ``None`` when not set."""
    text = values.text("validation_resolution")
    if not text:
        return None
    sizes = []
    place = f"{where}.validation_resolution"
    for part in text.split(","):
        match = _SIZE.fullmatch(part.strip().lower())
        if match is None:
            problems.append(
                Problem(place, f"{part.strip()!r} is no size; expected an edge or WIDTHxHEIGHT, comma-separated.")
            )
            continue
        size = int(match[1]), int(match[2] or match[1])
        step = family.picture_multiple
        near = tuple(max(step, round(edge / step) * step) for edge in size)
        if near != size:
            message = f"{size[0]}x{size[1]}: edges must be multiples of {step}; the nearest is {near[0]}x{near[1]}."
            problems.append(Problem(place, message))
        elif size not in sizes:
            sizes.append(size)
    return tuple(sizes)


def read_instruction(values: Values, where: str, cwd: Path, problems: list[Problem]) -> str:
    """Sana's instruction: a string, a list of lines, or the path of a text file; :data:`INSTRUCTION` when not set."""
    if "sana_complex_human_instruction" not in values:
        return INSTRUCTION
    lines = values.texts("sana_complex_human_instruction")
    if len(lines) != 1:
        return "\n".join(lines)
    text = lines[0]
    path = cwd / text
    if text and "\n" not in text and len(text) < 1024 and path.is_file():
        try:
            return path.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(f"{where}.sana_complex_human_instruction", f"{path} cannot be read ({error})."))
    return text
