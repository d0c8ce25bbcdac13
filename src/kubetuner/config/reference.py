"""``docs/config.md``, made of the schema: ``python -m kubetuner.config.reference docs/config.md`` writes it anew."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kubetuner.config.keys import Foreign, Key, Later, Unneeded
from kubetuner.config.run_file.keys import RUN_SCHEMA
from kubetuner.config.run_file.notes import GROUPS, Note

_HEAD = """\
# Keys of config.json

Written by `make docs` from the schema (`src/kubetuner/config/`); do not edit it.

Names are SimpleTuner's (4.8), with or without leading dashes, in upper or lower case, and with `-` or `_`. `null` means
"not set". An unknown key is an error that names the nearest known one. Strings may hold `{env:NAME}`. The last column
says where SimpleTuner differs; empty means that no difference is meant. The other file's keys are in
[data-file.md](data-file.md).
"""
_NOUNS = {
    "int": "whole number",
    "float": "number",
    "bool": "true, false",
    "str": "text",
    "texts": "text or list",
    "prompts": "file or object",
    "pick": "text or number",
    "json": "JSON",
}


def render() -> str:
    """The whole page."""
    blocks = [_HEAD, *(_group(title, notes) for title, notes in GROUPS.items())]
    blocks += [_unneeded(), _values(), _later(), _foreign(), _aliases()]
    return "\n".join(blocks)


def _group(title: str, notes: Mapping[str, Note]) -> str:
    rows = []
    for name, note in notes.items():
        rule = RUN_SCHEMA.rules[name]
        assert isinstance(rule, Key)  # The test of this page says which note has no key.
        default = note.otherwise or f"`{json.dumps(note.default)}`"
        rows.append((f"`{name}`", note.about, _allowed(rule), default, note.differs))
    return _table(title, "", ("key", "means", "values", "default", "SimpleTuner"), rows)


def _allowed(rule: Key) -> str:
    if rule.choices:
        return ", ".join(f"`{name}`" for name in rule.choices if name)
    bounds = [f"> {rule.above:g}"] if rule.above is not None else []
    bounds += [f"≥ {rule.low:g}"] if rule.low is not None else []
    bounds += [f"≤ {rule.high:g}"] if rule.high is not None else []
    return " ".join([_NOUNS[rule.kind], ", ".join(bounds)]).strip()


def _unneeded() -> str:
    rows = [(f"`{name}`", rule.reason) for name, rule in sorted(RUN_SCHEMA.rules.items()) if isinstance(rule, Unneeded)]
    about = "They tune machinery that does not exist here and cannot change a result; the plan's page names them."
    return _table("Accepted without effect", about, ("key", "why"), rows)


def _values() -> str:
    rows = []
    for name, rule in RUN_SCHEMA.rules.items():
        if not isinstance(rule, Key):
            continue
        if rule.later:
            rows.append((f"`{name}`", ", ".join(f"`{value}`" for value in sorted(rule.later)), "not available yet"))
        for reason in dict.fromkeys(rule.refused.values()):
            values = ", ".join(f"`{value}`" for value, why in rule.refused.items() if why == reason)
            rows.append((f"`{name}`", values, reason))
    about = "Of keys that are used: values that SimpleTuner has and that are errors here."
    return _table("Values that are refused", about, ("key", "values", "why"), rows)


def _later() -> str:
    rows = []
    for name, rule in sorted(RUN_SCHEMA.rules.items()):
        if isinstance(rule, Later):
            neutral = ", ".join(f"`{json.dumps(value)}`" for value in rule.neutral) or "only `null`"
            rows.append((f"`{name}`", f"{rule.what} not available yet", neutral))
    about = "Accepted where they ask for nothing; every other value is an error that says so."
    return _table("Not available yet", about, ("key", "why", "accepted"), rows)


def _foreign() -> str:
    rows = []
    for name, rule in sorted(RUN_SCHEMA.rules.items()):
        if isinstance(rule, Foreign):
            neutral = ", ".join(f"`{json.dumps(value)}`" for value in rule.neutral) or "nothing"
            rows.append((f"`{name}`", rule.reason, neutral))
    return _table("Refused", "They make no sense here.", ("key", "why", "accepted"), rows)


def _aliases() -> str:
    rows = [(f"`{old}`", f"`{alias.to}`") for old, alias in sorted(RUN_SCHEMA.aliases.items())]
    return _table("Old names", "Accepted, too.", ("old", "present"), rows)


def _table(title: str, about: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"## {title}", "", *([about, ""] if about else [])]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
