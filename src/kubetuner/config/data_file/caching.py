"""The keys of a picture entry that say when its latents are made, and how many at once."""

from collections.abc import Mapping

from kubetuner.config.keys import Values
from kubetuner.config.sections.geometry import VaeCache
from kubetuner.errors import Problem


def read_vae_cache(values: Values, run: Values, where: str, problems: list[Problem], notes: list[str]) -> VaeCache:
    """``vae_cache_disable`` and ``vae_cache_ondemand``, which the former implies; and what clearing would mean.

    Args:
        values: The entry's values.
        run: Values of ``config.json``, whose keys are the entries' defaults.
        where: File and index for messages.
        problems: Receives one entry per fault.
        notes: Receives what was accepted without effect.
    """
    disabled = _flag(values, run, "vae_cache_disable")
    moments = run.flag("vae_cache_moments")
    fresh = "with vae_cache_moments every use draws other latents, as encoding anew would" if moments else ""
    fresh = "with vae_cache_disable pictures are encoded at every use" if disabled else fresh
    _check_fresh(values, run, where, problems, notes, fresh)
    if disabled and moments:
        reason = "with vae_cache_disable every use draws another sample anyway, and nothing is kept"
        notes.append(f"{where}.`vae_cache_moments`: {reason}")
    return "disabled" if disabled else "ondemand" if _flag(values, run, "vae_cache_ondemand") else "ahead"


def least_vae_batch(entries: Mapping[str, int], run: Values, notes: list[str]) -> int | None:
    """How many pictures are encoded at once: the smallest ``vae_batch_size``, so that there is memory for each dataset.

    One size for all keeps a picture's latents the same whichever dataset they are made for.

    Args:
        entries: What picture entries say, by file and index; 0 for nothing.
        run: Values of ``config.json``.
        notes: Receives a line for each entry whose size is larger.

    Returns:
        ``None`` where no entry says a size.
    """
    if not any(entries.values()):
        return None
    least = min(size for size in (run.integer("vae_batch_size", 0), *entries.values()) if size)
    notes.extend(
        f"{where}.`vae_batch_size`: pictures of all datasets are encoded {least} at once, the least that is asked for"
        for where, size in entries.items()
        if size and size != least
    )
    return least


def _flag(values: Values, run: Values, name: str) -> bool:
    return values.flag(name) if name in values else run.flag(name)


def _check_fresh(
    values: Values, run: Values, where: str, problems: list[Problem], notes: list[str], fresh: str
) -> None:
    """``vae_cache_clear_each_epoch``: accepted where every use gives what clearing would.

    ``fresh`` says why it does; it is empty where it does not.
    """
    name = "vae_cache_clear_each_epoch"
    if not _flag(values, run, name):
        return
    drawn = [key for key in ("crop_style", "crop_aspect") if values.text(key) == "random"]
    drawn += ["crop_style"] if "crop_style" not in values else []
    if drawn:
        message = (
            f"is true, but pictures are encoded once, before training, and {drawn[0]} random is drawn once. Set it to "
            "false; vae_cache_moments in config.json draws other latents of the same crop at every use."
        )
        problems.append(Problem(f"{where}.{name}", message))
    elif not fresh:
        message = (
            "is true, but pictures are encoded once, before training. Set it to false, or vae_cache_moments in "
            "config.json to true: then every use draws from the VAE's distribution, as another encoding would."
        )
        problems.append(Problem(f"{where}.{name}", message))
    else:
        notes.append(f"{where}.`{name}`: {fresh}, and nothing is cleared")
