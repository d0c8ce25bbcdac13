"""Loading single parts of a pretrained pipeline, from a folder or the hub."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from kubetuner.config.models import vae_place
from kubetuner.config.sections.steps import ModelRef
from kubetuner.errors import InputError

REMEMBERED_WORDS = 1000
"""What a tokenizer remembers of the words it has parted, instead of 10,000."""


def hub_revision(ref: ModelRef) -> str | None:
    """The revision to ask the hub for; a folder's revision is the hash of its contents and asks for nothing."""
    return None if Path(ref.path).is_dir() else ref.revision or None


def default_device() -> torch.device:
    """Where a step's models go: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(part: Any, ref: ModelRef, subfolder: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model in ``subfolder`` as class ``part``, in eval mode and ``dtype``, however it is stored."""
    model = _from_pretrained(
        part.from_pretrained, ref, subfolder, dtype=dtype, variant=ref.variant or None, revision=hub_revision(ref)
    )
    return cast(nn.Module, model.to(device).eval())


def load_frozen(part: Any, ref: ModelRef, subfolder: str, device: torch.device) -> nn.Module:
    """As :func:`load_model`, float32 and without gradients."""
    return load_model(part, ref, subfolder, device, torch.float32).requires_grad_(False)


def load_tokenizer(part: Any, ref: ModelRef, subfolder: str, remembered: int = REMEMBERED_WORDS) -> Any:
    """The tokenizer in ``subfolder``, which remembers the pieces of so many words.

    The first thousand words make up most of every caption.
    """
    tokenizer = _from_pretrained(part.from_pretrained, ref, subfolder, revision=hub_revision(ref))
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    # The only way there is: the name has an underscore and is in the package's stubs. Tokenizers that part words by
    # looking them up have no such memory. A test of what is remembered fails when the name has changed.
    forget = getattr(model, "_resize_cache", None)
    if forget is not None:
        forget(remembered)
    return tokenizer


def load_autoencoder(part: Any, ref: ModelRef, device: torch.device) -> nn.Module:
    """The frozen float32 VAE: the pipeline's, or the one at ``vae_path`` (a VAE or a pipeline folder).

    Its weights are channels last, which every family's autoencoder gains from; see docs/performance.md.
    """
    place, subfolder = vae_place(ref)
    vae = load_frozen(part, place, subfolder, device)
    return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def load_parts(pipeline: Any, ref: ModelRef, parts: dict[str, nn.Module | None], device: torch.device) -> Any:
    """The whole float32 pipeline, with ``parts`` in place of its own; a part that is ``None`` is loaded as usual."""
    given = {name: part for name, part in parts.items() if part is not None}
    loaded = _from_pretrained(
        pipeline.from_pretrained,
        ref,
        "",
        dtype=torch.float32,
        variant=ref.variant or None,
        revision=hub_revision(ref),
        **given,
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(device)


def pipeline_setting(pipeline: Any, ref: ModelRef, name: str, default: bool) -> bool:
    """A switch of ``model_index.json``."""
    return bool(load_config(pipeline, ref, "").get(name, default))


def load_config(part: Any, ref: ModelRef, subfolder: str) -> dict[str, Any]:
    """The configuration of the part in ``subfolder``."""
    config: dict[str, Any] = _from_pretrained(part.load_config, ref, subfolder, revision=hub_revision(ref))
    return dict(config)


def _from_pretrained(load: Any, ref: ModelRef, subfolder: str, **options: Any) -> Any:
    """Call a diffusers or transformers loader; what it cannot find is the user's to put right."""
    folder = Path(ref.path)
    try:
        # Some tokenizer classes make an empty tokenizer, without a word, of a folder that is not there.
        if folder.is_dir() and not (folder / subfolder).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {subfolder}")
        return load(ref.path, **({"subfolder": subfolder} if subfolder else {}), **options)
    except (OSError, ValueError) as error:  # ValueError: a variant that the base does not have.
        what = f"{subfolder} of {ref.path}" if subfolder else ref.path
        raise InputError(
            f"cannot load {what} (revision {ref.revision or 'newest'}, variant {ref.variant or 'none'}) for "
            f"model_family {ref.family}: {error}. Check pretrained_model_name_or_path, revision and variant."
        ) from error
