"""How the C library keeps the memory that encoders free."""

import ctypes

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let this process keep up to 1 GiB of freed memory, and take blocks of up to that size from it.

    glibc gives the large blocks of a batch back to the kernel and gets them again, cleared page by page, for the next:
    for an autoencoder on a CPU as much work as a third of the arithmetic, or more. Without glibc nothing changes.
    """
    _set(_TRIM_THRESHOLD, _KEPT_BYTES)
    _set(_MMAP_THRESHOLD, _KEPT_BYTES)


def share_freed_memory() -> None:
    """Let threads that start from now on take memory from one place, where what any of them freed is used again.

    Otherwise glibc gives each thread a heap of its own, and those of threads that decode pictures go back to the kernel
    with every picture. For many threads with many small objects that would be slow; pictures are few and large.
    """
    _set(_ARENA_MAX, 1)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
