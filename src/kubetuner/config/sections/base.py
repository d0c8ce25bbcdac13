"""What every section and every group of settings inside one is: frozen, strict, and canonical as JSON."""

import json
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict

DEFAULT_SEED = 42
"""``seed`` where none is set, so that two runs agree."""


class Section(BaseModel):
    """A frozen group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls.model_validate_json(text)

    def deciding(self) -> dict[str, object]:
        """The settings that decide the result, as JSON values: all but ``SPEED_ONLY``."""
        return self.model_dump(mode="json", exclude=set(self.SPEED_ONLY))
