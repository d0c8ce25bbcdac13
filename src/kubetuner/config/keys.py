"""Reading one flat mapping of SimpleTuner keys against a schema; nothing is ever ignored.

A schema gives every known key one of four answers:

* :class:`Key`: it is used; its value is checked here.
* :class:`Later`: the behaviour does not exist yet; the neutral values, which ask for nothing, are accepted.
* :class:`Foreign`: it makes no sense here; refused with the reason, but for the neutral values it may have.
* :class:`Unneeded`: it tunes machinery that does not exist here and cannot change a result; noted for the plan's page.

Names may carry leading dashes, be upper-case (``MODEL_TYPE``) or be an old name. Strings may hold ``{env:VAR}``.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from kubetuner.errors import Problem

Kind = Literal["int", "float", "bool", "str", "texts", "prompts", "pick", "json"]


@dataclass(frozen=True)
class Json:
    """A value that is neither a scalar nor texts; the code that reads the key checks it."""

    value: object


Value = str | int | float | bool | None | tuple[str, ...] | dict[str, str] | Json

_ENV = re.compile(r"\{env:([^}]*)\}")
_NEAREST_SCORE = 65.0


@dataclass(frozen=True)
class Key:
    """A key that is used.

    Attributes:
        kind: Type of the value; ``texts`` is one string or a list, ``prompts`` a string or an object of strings,
            ``json`` is anything and is checked where it is read.
        choices: Allowed strings, with what each stands for where they differ.
        low: Smallest number allowed.
        high: Largest number allowed.
        above: Numbers must be larger than this.
        later: Choices that SimpleTuner has and that are not available yet.
        refused: Choices that SimpleTuner has and that make no sense here, with the reason.
        nullable: Whether ``null`` means "not set"; ``null`` then counts as absent.
    """

    kind: Kind
    choices: Mapping[str, str] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    above: float | None = None
    later: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    nullable: bool = True


@dataclass(frozen=True)
class Later:
    """A key whose behaviour is not available yet: accepted at ``neutral``, otherwise refused.

    Attributes:
        what: What the key would do, as the subject of a sentence.
        neutral: Values that ask for nothing new; ``None`` is always one.
    """

    what: str
    neutral: tuple[str | int | float | bool, ...] = ()


@dataclass(frozen=True)
class Foreign:
    """A key of SimpleTuner's that makes no sense here.

    Attributes:
        reason: Sentences that say why, and what to do instead.
        neutral: Values that ask for nothing and are accepted, as ``None`` then is; empty where every value is refused.
    """

    reason: str
    neutral: tuple[str | int | float | bool, ...] = ()


@dataclass(frozen=True)
class Unneeded:
    """A key that cannot change a result here: any value of ``kind`` is accepted and ``reason`` is noted."""

    kind: Kind
    reason: str


Rule = Key | Later | Foreign | Unneeded


@dataclass(frozen=True)
class Alias:
    """An old name: ``to`` takes its place, with the value converted."""

    to: str
    convert: Callable[[object], object] = lambda value: value


@dataclass(frozen=True)
class Schema:
    """All keys one mapping may hold."""

    rules: Mapping[str, Rule]
    aliases: Mapping[str, Alias] = field(default_factory=dict)


def one_of(*names: str) -> dict[str, str]:
    """Choices that stand for themselves."""
    return {name: name for name in names}


class Values:
    """The keys that were set, checked and under their present names."""

    def __init__(self, found: Mapping[str, Value], notes: Iterable[str] = ()) -> None:
        self._found = dict(found)
        self.notes = tuple(notes)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def get(self, name: str) -> Value:
        """The value, or ``None`` when not set."""
        return self._found.get(name)

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        value = self._found.get(name)
        return value if isinstance(value, str) else default

    def texts(self, name: str) -> tuple[str, ...]:
        """One or several strings."""
        value = self._found.get(name)
        return value if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()

    def json(self, name: str) -> object:
        """The JSON value of a ``json`` key; ``None`` when not set."""
        value = self._found.get(name)
        return value.value if isinstance(value, Json) else None

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self._found.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default

    def integer(self, name: str, default: int) -> int:
        """A whole number."""
        value = self._found.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._found.get(name)
        return value if isinstance(value, bool) else default

    def pick(self, *names: str) -> dict[str, object]:
        """The given keys as far as they are set, for a section's constructor."""
        return {name: self._found[name] for name in names if name in self._found}


class _RefusedError(Exception):
    """Carries one message to :func:`read`."""


def plain_name(name: str) -> str:
    """``--MODEL-TYPE`` as ``model_type``."""
    return name.strip().lstrip("-").replace("-", "_").lower()


def read(mapping: Mapping[str, object], schema: Schema, where: str, problems: list[Problem]) -> Values:
    """Check every key of ``mapping``; what is wrong is appended to ``problems``.

    Args:
        mapping: Keys and JSON values.
        schema: The known keys.
        where: File and index for messages.
        problems: Receives one entry per fault.
    """
    found: dict[str, Value] = {}
    notes: list[str] = []
    spelled: dict[str, str] = {}
    for written, raw in mapping.items():
        place = f"{where}.{written}"
        name = plain_name(written)
        try:
            value: object = raw
            if name in schema.aliases:
                alias = schema.aliases[name]
                value, name = alias.convert(_expand(raw)[0]), alias.to
            if name in spelled:
                raise _RefusedError(f"is the same key as {spelled[name]!r}; keep one of them.")
            spelled[name] = written
            rule = schema.rules.get(name)
            if rule is None:
                raise _RefusedError(_unknown(name, schema))
            _apply(name, rule, value, found, notes)
        except _RefusedError as refused:
            problems.append(Problem(place, str(refused)))
    return Values(found, notes)


def _apply(name: str, rule: Rule, raw: object, found: dict[str, Value], notes: list[str]) -> None:
    value, substituted = _expand(raw)
    if isinstance(rule, Foreign) and not rule.neutral:
        raise _RefusedError(f"{rule.reason} Remove the key.")
    if isinstance(rule, Foreign | Later):
        if value is not None and not any(_same(value, neutral) for neutral in rule.neutral):
            neutral = " or ".join(json.dumps(item) for item in rule.neutral) or "null"
            raise _RefusedError(
                f"is {_show(value)}: {rule.reason} Remove the key or set it to {neutral}."
                if isinstance(rule, Foreign)
                else f"{rule.what} not available yet (got {_show(value)}); remove the key or set it to {neutral}."
            )
        return
    if isinstance(rule, Unneeded):
        if value is not None:
            _check(Key(rule.kind), value, substituted)
            notes.append(f"`{name}`: {rule.reason}")
        return
    if value is None:
        if not rule.nullable:
            raise _RefusedError(f"is null; expected {_expected(rule)}.")
        return
    found[name] = _check(rule, value, substituted)


def _unknown(name: str, schema: Schema) -> str:
    from rapidfuzz import fuzz, process

    known = [*schema.rules, *schema.aliases]
    nearest = process.extractOne(name, known, scorer=fuzz.ratio, score_cutoff=_NEAREST_SCORE)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "check the spelling or remove the key."
    return f"is not a known key; {hint}"


def _expand(raw: object) -> tuple[object, bool]:
    """``raw`` with ``{env:VAR}`` replaced, and whether something was."""
    if not isinstance(raw, str) or not _ENV.search(raw):
        return raw, False

    def value_of(match: re.Match[str]) -> str:
        value = os.environ.get(match.group(1))
        if value is None:
            raise _RefusedError(
                f"names the environment variable {match.group(1)!r}, which is not set; set it or write a value."
            )
        return value

    return _ENV.sub(value_of, raw), True


def _check(rule: Key, value: object, substituted: bool) -> Value:
    if rule.kind == "json":
        return Json(value)
    if rule.kind in ("int", "float", "bool"):
        if substituted and isinstance(value, str):
            value = _from_text(value)
        return _check_plain(rule, value)
    return _check_text(rule, value)


def _from_text(text: str) -> object:
    """The JSON value of an environment variable's text; such text has no other way to be a number."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def _check_plain(rule: Key, value: object) -> Value:
    wrong = _RefusedError(f"is {_show(value)}; expected {_expected(rule)}{_quotes_hint(value)}.")
    if rule.kind == "bool":
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong
    if rule.kind == "int":
        if value != int(value):
            raise wrong
        value = int(value)
    else:
        value = float(value)
    too_low = (rule.low is not None and value < rule.low) or (rule.above is not None and value <= rule.above)
    if too_low or (rule.high is not None and value > rule.high):
        raise wrong
    return value


def _check_text(rule: Key, value: object) -> Value:
    if rule.kind == "texts" and isinstance(value, list | tuple):
        texts = tuple(item for item in value if isinstance(item, str))
        if len(texts) == len(value):
            return texts
    if rule.kind == "prompts" and isinstance(value, Mapping):
        prompts = {key: item for key, item in value.items() if isinstance(key, str) and isinstance(item, str)}
        if len(prompts) == len(value):
            return prompts
    if rule.kind == "pick" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if rule.kind == "pick" and isinstance(value, float) and value == int(value):
        value = str(int(value))
    if not isinstance(value, str):
        raise _RefusedError(f"is {_show(value)}; expected {_expected(rule)}.")
    if rule.choices:
        if value in rule.later:
            raise _RefusedError(f"is {value!r}, which is not available yet; use {_expected(rule)}.")
        if value in rule.refused:
            raise _RefusedError(f"is {value!r}: {rule.refused[value]} Use {_expected(rule)}.")
        if value not in rule.choices:
            raise _RefusedError(f"is {value!r}; expected {_expected(rule)}.")
        return rule.choices[value]
    return value


def _expected(rule: Key) -> str:
    if rule.choices:
        return " or ".join(repr(name) for name in rule.choices)
    noun = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a string",
        "texts": "a string or a list of strings",
        "prompts": "the path of a JSON file, or an object of strings",
        "pick": "a string or a whole number",
        "json": "a JSON value",
    }[rule.kind]
    bounds = [f"above {rule.above:g}"] if rule.above is not None else []
    bounds += [f"at least {rule.low:g}"] if rule.low is not None else []
    bounds += [f"at most {rule.high:g}"] if rule.high is not None else []
    return " ".join([noun, " and ".join(bounds)]).strip()


def _quotes_hint(value: object) -> str:
    if not isinstance(value, str):
        return ""
    return ", without quotes" if not isinstance(_from_text(value), str) else ""


def _show(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _same(value: object, neutral: object) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
