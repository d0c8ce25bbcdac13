"""The entries of ``caption_filter_list``.

``s/search/replacement/`` replaces the first match of a regular expression, with ``g`` at its end every match. Any other
entry is removed wherever it matches; one that is no regular expression is taken literally. Blank entries do nothing.
"""

import re
from dataclasses import dataclass

_SLASH = re.compile(r"(?<!\\)/")


@dataclass(frozen=True)
class CaptionFilter:
    """One entry.

    Attributes:
        pattern: What is looked for.
        replacement: What takes its place; may name groups.
        count: How many matches are replaced; 0 for all.
    """

    pattern: re.Pattern[str]
    replacement: str = ""
    count: int = 0

    def apply(self, caption: str) -> str:
        """``caption`` without what the entry removes."""
        return self.pattern.sub(self.replacement, caption, count=self.count)


def parse_filter(entry: str) -> CaptionFilter:
    """The meaning of an entry.

    Raises:
        ValueError: It begins with ``s/`` and is not ``s/search/replacement/``, or its expression is not valid.
    """
    if not entry.startswith("s/"):
        try:
            return CaptionFilter(re.compile(entry))
        except re.error:
            return CaptionFilter(re.compile(re.escape(entry)))
    _, search, *rest = _SLASH.split(entry)
    if not search or not 1 <= len(rest) <= 2 or rest[1:] not in ([], [""], ["g"]):
        raise ValueError("begins with s/ and is not s/search/replacement/")
    try:
        found = CaptionFilter(
            re.compile(search.replace(r"\/", "/")), rest[0].replace(r"\/", "/"), int(rest[1:] != ["g"])
        )
        found.apply("")  # parses the replacement
    except (re.error, IndexError) as error:
        raise ValueError(f"is not a valid replacement ({error})") from error
    return found
