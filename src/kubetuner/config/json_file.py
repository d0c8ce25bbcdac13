"""Reading JSON files that people wrote; apart from the schema, whose import takes longer than a file."""

import json
from pathlib import Path

from kubetuner.errors import InputError


def read_json(path: Path) -> object:
    """The JSON value of ``path``.

    Raises:
        InputError: The file cannot be read or is not JSON.
    """
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    return value
