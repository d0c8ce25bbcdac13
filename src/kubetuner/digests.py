"""Digests: of files by their bytes, of settings and inputs by their canonical JSON."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel


def fingerprint(*parts: object) -> str:
    """SHA-256 (hex) of the canonical JSON of ``parts``: JSON values or pydantic models."""
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()


def fingerprinting(*common: object) -> Callable[..., str]:
    """``fingerprint(*parts, *common)`` of many ``parts``, at least one; what they have in common is made JSON once."""
    end = canonical_json(list(common))[1:]

    def fingerprint_of(*parts: object) -> str:
        return hashlib.sha256(f"{canonical_json(list(parts))[:-1]},{end}".encode()).hexdigest()

    return fingerprint_of


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces; equal values give equal text."""
    return _CANONICAL.encode(value)


def _plain(item: object) -> object:
    if isinstance(item, BaseModel):
        return item.model_dump(mode="json")
    raise TypeError(f"{type(item).__name__} has no JSON form")


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def sha256_of(path: Path | str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
