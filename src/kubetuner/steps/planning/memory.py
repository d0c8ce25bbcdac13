"""Whether training will fit a GPU: the predicted peak of its memory, and settings that take less.

Nothing is changed here: the settings are tried through the same prediction, and shown.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kubetuner.config.models import OUTLINES
from kubetuner.config.optimizers import OPTIMIZERS
from kubetuner.config.precision import unroundable
from kubetuner.config.sections.steps import Sections, TrainSection
from kubetuner.environment import number_above_zero
from kubetuner.errors import InputError
from kubetuner.steps.planning.costs import vae_shape
from kubetuner.steps.planning.datasets import Measured, Size, kept_buckets

if TYPE_CHECKING:
    from kubetuner.training.memory.encoding import Encoding
    from kubetuner.training.memory.prediction import Memory

logger = logging.getLogger(__name__)

CARD = "KUBETUNER_GPU_MEMORY_GIB"
"""The environment variable for a GPU's memory; without it the GPU of this machine counts, if there is one."""
GIB = 2**30
SIZES = (8, 10, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
"""Memory of the GPUs that are sold, in GiB."""
USABLE = 0.9
"""Share of a GPU's memory that tensors can have; CUDA's context, workspaces and gaps take the rest."""
_SMALL_SHARE = 0.05

Change = Mapping[str, object]
Predict = Callable[[TrainSection], "Memory"]


@dataclass(frozen=True)
class Option:
    """Settings of ``config.json`` that were tried, and the peak that they are predicted to have, in bytes."""

    change: Change
    peak: int


@dataclass(frozen=True)
class Forecast:
    """What was predicted.

    Attributes:
        batch: The batch that takes most, for a person.
        memory: ``None`` where nothing was predicted.
        reason: Why nothing was.
        card: Bytes of the GPU's memory; 0 when it is not known.
        options: Settings that take less, tried because these do not fit; in the order in which to try them.
        own_sizes: Ids of the datasets whose batches the data file says, so that no option changes them.
    """

    batch: str = ""
    memory: "Memory | None" = None
    reason: str = ""
    card: int = 0
    options: tuple[Option, ...] = ()
    own_sizes: tuple[str, ...] = ()

    def fits(self, peak: int) -> bool:
        """Whether the GPU has room for it."""
        return peak <= USABLE * self.card


def forecast(sections: Sections, measured: Sequence[Measured]) -> Forecast:
    """Predict the peak for the batch that takes most; where PyTorch is missing, say so.

    Raises:
        InputError: The environment's value for the GPU's memory is no number above 0.
    """
    card = _card()
    missing = [name for name in ("torch", "diffusers", "peft") if find_spec(name) is None]
    if missing:
        return Forecast(
            reason=f"{', '.join(missing)} is not installed here; kubetuner[train] has it. `kubetuner validate` on a "
            "machine with it (no GPU needed) tells.",
            card=card,
        )
    train = sections.train
    if train.fsdp is not None:
        return Forecast(reason="weights that processes share out (fsdp_enable) are not predicted yet.", card=card)
    logger.info("Predicting GPU memory; this takes seconds")
    try:
        batches = _Batches(sections, measured)
        memory, batch = batches.predict(train)
        card = card or _local_card()
        own = tuple(one.id for one in train.datasets if one.train_batch_size)
        found = Forecast(batch, memory, card=card, own_sizes=own)
        if not card or found.fits(memory.peak):
            return found
        options = _options(train, lambda changed: batches.predict(changed)[0], found.fits)
        return replace(found, options=tuple(options))
    except InputError as error:
        return Forecast(reason=f"{error}", card=card)


class _Batches:
    """The largest batch of every size of batches: which of them takes most is for the prediction to say.

    Raises:
        InputError: The autoencoder's configuration is not to be had.
    """

    def __init__(self, sections: Sections, measured: Sequence[Measured]) -> None:
        from kubetuner.training.memory.prediction import Predictor, Shapes

        train = sections.train
        factor, channels = vae_shape(train.model)
        outline = OUTLINES[train.model.family]
        self._tokens = sections.cache_text_embeds.max_length or outline.text_floats // outline.text_width
        encoding = _encoding(sections, measured)
        drawn = [one for one in measured if one.trained_on and kept_buckets(one, train)]
        self._predictors: list[tuple[int | None, Size, Predictor]] = []
        for own in {one.entry.sampling.train_batch_size: None for one in drawn}:
            width, height = _largest([one for one in drawn if one.entry.sampling.train_batch_size == own], train)
            shapes = Shapes((channels, height // factor, width // factor), self._tokens, own)
            self._predictors.append((own, (width, height), Predictor(shapes, encoding)))

    def predict(self, train: TrainSection) -> "tuple[Memory, str]":
        """The most that one of the batches takes, and that batch in words."""
        sizes = [(own or train.train_batch_size, width * height) for own, (width, height), _ in self._predictors]
        found = [
            (predictor.predict(train), f"{size[0]} of {width}x{height}, captions of {self._tokens} tokens")
            for (_, (width, height), predictor), size in zip(self._predictors, sizes, strict=True)
            if not any(_has_less(size, other) for other in sizes)
        ]
        return max(found, key=lambda one: one[0].peak)


def _has_less(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether a batch of so many samples of so many pixels takes less than another one for sure."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _encoding(sections: Sections, measured: Sequence[Measured]) -> "Encoding":
    """What the datasets take whose latents are made while training."""
    from kubetuner.training.memory.encoding import Encoding, predict_encoding

    online = [
        one
        for one in measured
        if one.trained_on and one.entry.geometry.vae_cache != "ahead" and kept_buckets(one, sections.train)
    ]
    if not online:
        return Encoding()
    settings = sections.cache_vae
    moments = settings.vae_cache_moments or any(one.entry.geometry.vae_cache == "disabled" for one in online)
    return predict_encoding(
        sections.train.model, settings.vae_batch_size, _largest(online, sections.train), moments=moments
    )


def smallest_card(peak: int) -> int:
    """GiB of the smallest usual GPU with room for ``peak`` bytes; 0 when there is none."""
    return next((size for size in SIZES if peak <= USABLE * size * GIB), 0)


def _card() -> int:
    """Bytes by the environment; 0 when it does not say."""
    size = number_above_zero(os.environ, CARD, "the GPU's memory in GiB, such as 24.", below=10_000)
    return 0 if size is None else int(size * GIB)


def _local_card() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def _largest(measured: Sequence[Measured], train: TrainSection) -> Size:
    """Width and height of the pictures of the largest bucket that is drawn from."""
    sizes = {size for one in measured for name in kept_buckets(one, train) for size in one.buckets[name]}
    return max(sizes, key=lambda size: (size[0] * size[1], size))


def _options(train: TrainSection, predict: Predict, fits: Callable[[int], bool]) -> list[Option]:
    """Each change alone that helps; then, where none of them is enough, as many together as it takes."""
    memory = predict(train)
    rungs = _rungs(train, memory)
    logger.info("It does not fit; trying %d settings that may take less", len(rungs))
    alone = [Option(rung, predict(_changed(train, rung)).peak) for rung in rungs]
    helping = [option for option in alone if option.peak < memory.peak]
    if len(helping) < 2 or any(fits(option.peak) for option in helping):
        return helping
    together = helping[0]
    for option in helping[1:]:
        change = {**together.change, **option.change}
        together = Option(change, predict(_changed(train, change)).peak)
        if fits(together.peak):
            break
    return [*helping, together]


def _rungs(train: TrainSection, memory: "Memory") -> list[Change]:
    """Single changes that take less memory: first those that keep the result, then those that touch precision."""
    changes: list[Change] = []
    if train.attention_mechanism == "native-math":
        changes.append({"attention_mechanism": "diffusers"})
    if train.ema is not None and train.ema.device == "accelerator":
        changes.append({"ema_device": "cpu"})
    if not train.gradient_checkpointing:
        changes.append({"gradient_checkpointing": True})
    elif train.gradient_checkpointing_interval > 1:
        changes.append({"gradient_checkpointing_interval": 1})
    if train.mixed_precision == "no":
        changes.append({"mixed_precision": "bf16"})
    if not any(dataset.train_batch_size for dataset in train.datasets):  # Those are in the other file.
        changes.extend(_batches(train))
    matters = memory.optimizer > _SMALL_SHARE * memory.peak
    if matters and OPTIMIZERS[train.optimizer].state_bytes > OPTIMIZERS["bnb-adamw8bit"].state_bytes:
        changes.append({"optimizer": "bnb-adamw8bit"})
    if matters and OPTIMIZERS[train.optimizer].state_bytes > OPTIMIZERS["bnb-lion8bit"].state_bytes:
        changes.append({"optimizer": "bnb-lion8bit"})
    if train.base_model_precision == "no_change" and not unroundable(train, "int8-quanto"):
        changes.append({"base_model_precision": "int8-quanto"})
    if train.base_model_precision != "nf4-bnb" and not unroundable(train, "nf4-bnb"):
        changes.append({"base_model_precision": "nf4-bnb"})
    return changes


def _batches(train: TrainSection) -> list[Change]:
    """Half the batch, and batches of one, with more of them per step: as many pictures per step as before."""
    size, steps = train.train_batch_size, train.gradient_accumulation_steps
    smaller = [size // 2] if size % 2 == 0 and size > 2 else []
    return [
        {"train_batch_size": batch, "gradient_accumulation_steps": steps * size // batch}
        for batch in [*smaller, *([1] if size > 1 else [])]
    ]


def _changed(train: TrainSection, change: Change) -> TrainSection:
    """``train`` with settings of ``config.json``."""
    update = {name: value for name, value in change.items() if name != "ema_device"}
    if "ema_device" in change and train.ema is not None:
        update["ema"] = train.ema.model_copy(update={"device": change["ema_device"]})
    return train.model_copy(update=update)
