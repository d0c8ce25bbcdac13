"""Digests: of files by their bytes, of settings and inputs by their canonical JSON."""

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel


def fingerprint(*parts: object) -> str:
    """SHA-256 (hex) of the canonical JSON of ``parts``: JSON values or pydantic models."""
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces; equal values give equal text."""

    def default(item: object) -> object:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        raise TypeError(f"{type(item).__name__} has no JSON form")

    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=default)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
