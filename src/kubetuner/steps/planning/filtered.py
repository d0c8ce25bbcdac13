"""What ``filter_func`` leaves out, for the plan's page."""

from collections.abc import Sequence

from kubetuner.sources.filters import KEY, describe
from kubetuner.steps.planning.datasets import Measured


def filter_remarks(measured: Sequence[Measured]) -> list[str]:
    """A sentence for each dataset of which something is left out."""
    return [
        f"`{one.id}`: {KEY} leaves out {sum(each.count for each in one.filtered)} pictures: {describe(one.filtered)}"
        for one in measured
        if one.filtered
    ]
