"""Files that are there whole or not at all, by name as text: Python keeps a table of the parts of path objects.

That table grows with the number of such objects, and steps write very many files.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """A temporary file beside ``path`` that, when it is filled, is flushed to disk and renamed over ``path``."""
    folder, name = os.path.split(path)
    os.makedirs(folder or ".", exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder or ".", prefix=f".{name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def write_bytes(path: str, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        stream.write(data)
