"""What the plan says of datasets whose latents are made while training."""

from collections.abc import Sequence

from kubetuner.config.sections.steps import Sections
from kubetuner.steps.planning.datasets import Measured

_KEPT = (
    "are encoded when training first comes to them and kept in the store, for which KUBETUNER_STORE must be set "
    "(`kubetuner run` sets it); epochs and runs after that read them"
)
_DISABLED = "are made at every use and not kept"


def on_demand_remarks(sections: Sections, measured: Sequence[Measured]) -> list[str]:
    """One line for each such dataset, and what it asks of ``train``."""
    said = {"ondemand": _KEPT, "disabled": _DISABLED}
    remarks = [
        f"The latents of `{one.id}` ({one.samples} pictures) {said[mode]} (`{key}`)."
        for one in measured
        for mode, key in (("ondemand", "vae_cache_ondemand"), ("disabled", "vae_cache_disable"))
        if one.entry.geometry.vae_cache == mode
    ]
    if not remarks:
        return []
    size = sections.cache_vae.vae_batch_size
    cost = (
        f"`train` then holds the VAE on its GPU too and encodes {size} pictures at once (`vae_batch_size`; fewer take "
        "less memory), and reads the pictures."
    )
    return [*remarks, cost]
