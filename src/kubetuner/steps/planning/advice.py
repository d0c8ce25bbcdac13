"""Settings with which a dataset that is too small for an optimizer step would fill one."""

from collections.abc import Sequence


def batches_of(buckets: Sequence[int], size: int) -> int:
    """Whole batches of ``size`` pictures in buckets of so many pictures; each batch is of one bucket."""
    return sum(count // size for count in buckets)


def fewest_passes(buckets: Sequence[int], size: int, batches: int, least: int = 1) -> int:
    """How often the pictures must be gone through, at least ``least`` times, to give so many batches of ``size``."""
    passes = least
    while batches_of([count * passes for count in buckets], size) < batches:
        passes += 1
    return passes


def largest_batch(buckets: Sequence[int], batches: int) -> int:
    """The largest batch size that gives so many batches; 0 where there are fewer pictures than batches."""
    return next((size for size in range(max(buckets), 0, -1) if batches_of(buckets, size) >= batches), 0)
