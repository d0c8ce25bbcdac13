"""``multidatabackend.json``: its entries, and the checks between them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from kubetuner.config.data_file.caching import least_vae_batch, read_vae_cache
from kubetuner.config.data_file.captions import read_filters, read_shuffle
from kubetuner.config.data_file.crops import read_crop
from kubetuner.config.data_file.keys import LATENTS_SCHEMA, MASK_SCHEMA, PICTURE_SCHEMA, TEXT_SCHEMA
from kubetuner.config.data_file.masks import MaskData, MaskLinks
from kubetuner.config.data_file.parquet import read_metadata_table
from kubetuner.config.data_file.sampling import Epochs, read_epochs, read_sampling
from kubetuner.config.data_file.sources import flatten_hub, read_storage
from kubetuner.config.keys import Values, plain_name, read
from kubetuner.config.sections.base import DEFAULT_SEED
from kubetuner.config.sections.captions import DatasetCaptions
from kubetuner.config.sections.geometry import DatasetGeometry, Geometry
from kubetuner.config.sections.sources import DatasetSource
from kubetuner.config.sections.steps import DatasetSampling
from kubetuner.errors import Problem

_ALIGNMENTS = (8, 16, 24, 32, 64)
_SIZES = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
# SimpleTuner's bounds against mixed-up units, but 16 instead of its 512 pixels: small pictures are legitimate here.
_MOST_MEGAPIXELS = {
    "resolution": 20.0,
    "minimum_image_size": 5.0,
    "maximum_image_size": 20.0,
    "target_downsample_size": 20.0,
}
_FEWEST_PIXELS = 16
_DISCOVERIES = ("vae", "aspect", "text", "metadata")


@dataclass(frozen=True)
class PictureData:
    """One enabled entry that holds pictures.

    Attributes:
        where: File and index, for messages.
        epochs: When it is drawn from, where that is said in epochs.
        repeats_set: Whether ``repeats`` is the user's; others may be raised (``allow_dataset_oversubscription``).
        vae_batch_size: How many of its pictures may be encoded at once; 0 where it does not say.
    """

    where: str
    source: DatasetSource
    geometry: DatasetGeometry
    sampling: DatasetSampling
    captions: DatasetCaptions
    repeats_set: bool = False
    vae_batch_size: int = 0
    epochs: Epochs | None = None


@dataclass(frozen=True)
class Data:
    """All enabled entries.

    Attributes:
        masks: Those that hold masks.
        notes: What was accepted and has no effect here.
        vae_batch_size: Pictures encoded at once; ``None`` where no entry says it.
    """

    pictures: tuple[PictureData, ...] = ()
    masks: tuple[MaskData, ...] = ()
    notes: tuple[str, ...] = ()
    vae_batch_size: int | None = None

    def of(self, dataset_type: Literal["image", "eval"]) -> tuple[PictureData, ...]:
        """Entries of one role."""
        return tuple(entry for entry in self.pictures if entry.source.dataset_type == dataset_type)


_SCHEMAS = {"text_embeds": TEXT_SCHEMA, "image_embeds": LATENTS_SCHEMA, "conditioning": MASK_SCHEMA}


@dataclass
class _Seen:
    """What entries must not share."""

    ids: dict[str, str] = field(default_factory=dict)
    cache_dirs: dict[str, str] = field(default_factory=dict)
    text_filters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    default_text: str = ""
    text_of: dict[str, str] = field(default_factory=dict)
    latents: set[str] = field(default_factory=set)
    references: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    masks: MaskLinks = field(default_factory=MaskLinks)


def read_data(
    entries: Sequence[object],
    run: Values,
    file: str,
    problems: list[Problem],
    *,
    facts: Mapping[str, str],
    cwd: Path = Path(),
) -> Data:
    """Read every entry; what is wrong is appended to ``problems``.

    Args:
        entries: The JSON list.
        run: Values of ``config.json``, whose data keys are the entries' defaults.
        file: Name of the data file for messages.
        problems: Receives one entry per fault.
        facts: ``model_type``, ``model_family`` and ``output_dir``, for ``{placeholders}`` and checks.
        cwd: Folder that the paths in the file are relative to.
    """
    seen = _Seen()
    pictures = []
    for index, entry in enumerate(entries):
        where = f"{file}[{index}]"
        if not isinstance(entry, Mapping):
            problems.append(Problem(where, f"is a {type(entry).__name__}; expected an object."))
            continue
        faults: list[Problem] = []
        fields = _fill(flatten_hub(entry, where, faults), facts)
        kind = next((value for name, value in fields.items() if plain_name(name) == "dataset_type"), None)
        schema = _SCHEMAS.get(str(kind), PICTURE_SCHEMA)
        values = read(fields, schema, where, faults)
        if values.flag("disabled"):
            continue
        problems.extend(faults)
        _check_id(values, where, seen, problems)
        seen.notes.extend(f"{where}.{note}" for note in values.notes)
        _note_discovery(values, where, seen, problems)
        if kind == "text_embeds":
            _read_texts(values, where, cwd, seen, problems)
        elif kind == "image_embeds":
            seen.latents.add(values.text("id"))
            _check_cache_dir(values, "cache_dir", where, seen, problems)
        elif kind == "conditioning":
            _check_cache_dir(values, "cache_dir_vae", where, seen, problems)
            seen.masks.add(values, where, problems)
        elif (picture := _read_pictures(values, run, where, seen, problems, facts=facts)) is not None:
            pictures.append(picture)
    for where, kind, name in seen.references:
        if name not in (seen.latents if kind == "image_embeds" else seen.text_filters):
            message = f"names {name!r}, but no enabled entry with dataset_type {kind} has that id."
            problems.append(Problem(where, message))
    pictures, masks = [_with_filters(one, seen) for one in pictures], seen.masks.linked(seen.ids, problems)
    at_once = least_vae_batch({one.where: one.vae_batch_size for one in pictures}, run, seen.notes)
    data = Data(tuple(pictures), masks, (*seen.notes, *_unused_filters(pictures, seen)), at_once)
    if not data.of("image") and not problems:
        problems.append(Problem(file, "has no enabled entry with dataset_type image; there is nothing to train on."))
    if data.of("image") and all(entry.sampling.is_regularisation_data for entry in data.of("image")):
        message = "has only regularisation data, whose target is the base model; nothing would be learned."
        problems.append(Problem(file, message))
    return data


def _fill(entry: dict[str, object], facts: Mapping[str, str]) -> dict[str, object]:
    """Replace ``{model_family}``, ``{output_dir}`` and ``{id}`` in strings."""
    names = {**facts, "id": str(entry.get("id", ""))}

    def filled(value: object) -> object:
        if isinstance(value, str):
            for name, text in names.items():
                value = value.replace("{" + name + "}", text) if isinstance(value, str) else value
        return value

    return {name: filled(value) for name, value in entry.items()}


def _check_id(values: Values, where: str, seen: _Seen, problems: list[Problem]) -> None:
    name = values.text("id")
    if not name or "/" in name or name != name.strip():
        if "id" in values or not any(problem.where == f"{where}.id" for problem in problems):
            message = f"is {name!r}; expected a name without slashes, unique in the file."
            problems.append(Problem(f"{where}.id", message if "id" in values else "is missing; every entry needs one."))
    elif name in seen.ids:
        problems.append(Problem(f"{where}.id", f"is {name!r}, as in {seen.ids[name]}; ids must differ."))
    else:
        seen.ids[name] = where


def _text_entry(picture: PictureData, seen: _Seen) -> str:
    """Id of the entry's ``text_embeds``: the one it names, or else the default one, or else the first."""
    default = seen.default_text or next(iter(seen.text_filters), "")
    return seen.text_of.get(picture.source.id, default)


def _with_filters(picture: PictureData, seen: _Seen) -> PictureData:
    filters = seen.text_filters.get(_text_entry(picture, seen), ())
    return replace(picture, captions=picture.captions.model_copy(update={"filters": filters}))


def _unused_filters(pictures: Sequence[PictureData], seen: _Seen) -> list[str]:
    used = {_text_entry(picture, seen) for picture in pictures}
    unused = (name for name, filters in seen.text_filters.items() if filters and name not in used)
    return [f"{seen.ids.get(name, name)}.`caption_filter_list`: no dataset names this entry" for name in unused]


def _read_texts(values: Values, where: str, cwd: Path, seen: _Seen, problems: list[Problem]) -> None:
    name = values.text("id")
    seen.text_filters[name] = read_filters(values, where, cwd, problems)
    if values.flag("default"):
        if seen.default_text:
            other = seen.ids.get(seen.default_text, "another entry")
            problems.append(Problem(f"{where}.default", f"is true, as in {other}; one entry is the default."))
        seen.default_text = name
    _check_cache_dir(values, "cache_dir", where, seen, problems)


def _check_cache_dir(values: Values, key: str, where: str, seen: _Seen, problems: list[Problem]) -> None:
    folder = values.text(key)
    if not folder:
        return
    seen.notes.append(f"{where}.`{key}`: caches are artifacts, kept by content in the store")
    folder = os.path.normpath(folder)
    if folder in seen.cache_dirs:
        message = f"is {folder!r}, as in {seen.cache_dirs[folder]}; give every entry a cache folder of its own."
        problems.append(Problem(f"{where}.{key}", message))
    else:
        seen.cache_dirs[folder] = f"{where}.{key}"


def _read_pictures(
    values: Values, run: Values, where: str, seen: _Seen, problems: list[Problem], *, facts: Mapping[str, str]
) -> PictureData | None:
    before = len(problems)
    _check_cache_dir(values, "cache_dir_vae", where, seen, problems)
    for kind in ("text_embeds", "image_embeds"):
        if kind in values:
            seen.references.append((f"{where}.{kind}", kind, values.text(kind)))
    if "text_embeds" in values:
        seen.text_of[values.text("id")] = values.text("text_embeds")
    seen.masks.note(values, where, problems)
    storage = read_storage(values, run, where, problems)
    _check_captions(values, run, where, problems)
    table = read_metadata_table(values, str(storage["caption_strategy"]), where, problems)
    sampling = read_sampling(values, where, problems, seen.notes, facts=facts)
    geometry = _geometry(values, run, where, problems, seen.notes)
    vae_cache = read_vae_cache(values, run, where, problems, seen.notes)
    shuffle = read_shuffle(values, where, run.integer("seed", DEFAULT_SEED), problems)
    if len(problems) > before or not values.text("id"):
        return None
    name = values.text("id")
    captions = values if "instance_prompt" in values else run
    source = DatasetSource.model_validate(
        {
            **storage,
            **values.pick(
                "id",
                "dataset_type",
                "prepend_instance_prompt",
                "only_instance_prompt",
                "disable_multiline_split",
                "max_num_samples",
            ),
            "instance_prompt": captions.texts("instance_prompt"),
            "metadata_table": table,
        }
    )
    return PictureData(
        where,
        source,
        DatasetGeometry(id=name, geometry=geometry, vae_cache=vae_cache),
        sampling,
        DatasetCaptions(id=name, shuffle=shuffle),
        repeats_set="repeats" in values,
        vae_batch_size=values.integer("vae_batch_size", 0),
        epochs=read_epochs(values),
    )


def _note_discovery(values: Values, where: str, seen: _Seen, problems: list[Problem]) -> None:
    """``skip_file_discovery``: its words are checked, and skipping is not needed."""
    words = values.text("skip_file_discovery").replace(",", " ").split()
    unknown = [word for word in words if word not in _DISCOVERIES]
    if unknown:
        message = f"names {', '.join(unknown)}; expected words of {', '.join(_DISCOVERIES)}."
        problems.append(Problem(f"{where}.skip_file_discovery", message))
    elif words:
        reason = "plan and download list a folder once each, and caches are found by content without a scan"
        seen.notes.append(f"{where}.`skip_file_discovery`: {reason}")


def _check_captions(values: Values, run: Values, where: str, problems: list[Problem]) -> None:
    strategy = values.text("caption_strategy") or run.text("caption_strategy")
    prompts = values.texts("instance_prompt") or run.texts("instance_prompt")
    wants = [
        reason
        for reason, true in (
            ("caption_strategy instanceprompt", strategy == "instanceprompt"),
            ("prepend_instance_prompt", values.flag("prepend_instance_prompt")),
            ("only_instance_prompt", values.flag("only_instance_prompt")),
        )
        if true
    ]
    if wants and not any(prompts):
        problems.append(Problem(f"{where}.instance_prompt", f"is missing or empty; {wants[0]} needs a prompt."))
    if "instance_prompt" in values and not wants:
        message = "would not be used; set caption_strategy to instanceprompt or prepend_instance_prompt to true."
        problems.append(Problem(f"{where}.instance_prompt", message))


def _geometry(values: Values, run: Values, where: str, problems: list[Problem], notes: list[str]) -> Geometry:
    before = len(problems)
    names = (
        "resolution", "resolution_type", "aspect_bucket_alignment", "aspect_bucket_rounding", "max_upscale_threshold",
        *_SIZES[1:],
    )  # fmt: skip
    both = Values({name: values.get(name) if name in values else run.get(name) for name in names})
    unit = both.text("resolution_type", "pixel_area")
    if unit == "area" and both.get("resolution") is None:
        problems.append(Problem(f"{where}.resolution", "is missing; with resolution_type area it is in megapixels."))
    for name in _SIZES:
        size = both.number(name, -1.0)
        if size >= 0 and (fault := _size_fault(name, size, unit)):
            problems.append(Problem(f"{where}.{name}", fault))
    alignment = both.integer("aspect_bucket_alignment", 64)
    if alignment not in _ALIGNMENTS:
        problems.append(Problem(f"{where}.aspect_bucket_alignment", f"is {alignment}; expected one of {_ALIGNMENTS}."))
    if len(problems) == before:  # sizes in mixed-up units cannot be compared
        _check_maximum(values, both, where, problems)
    chosen = {name: both.get(name) for name in names if both.get(name) is not None}
    return Geometry.model_validate({**chosen, **read_crop(values, where, problems, notes)})


def _size_fault(name: str, size: float, unit: str) -> str:
    if unit == "area":
        most = _MOST_MEGAPIXELS[name]
        too_large = size >= most if name != "minimum_image_size" else size > most
        if too_large:
            return f"is {size:g} megapixels, which looks like pixels: use pixel_area, or less than {most:g}."
        return ""
    if unit == "pixel_area" and size != int(size):
        return f"is {size:g}; with resolution_type pixel_area it is a whole number of pixels (for megapixels use area)."
    if name == "minimum_image_size" and size == 0:
        return ""
    if size < _FEWEST_PIXELS:
        return (
            f"is {size:g} pixels; that looks like megapixels: use resolution_type area, or at least {_FEWEST_PIXELS}."
        )
    return ""


def _check_maximum(values: Values, both: Values, where: str, problems: list[Problem]) -> None:
    if both.get("maximum_image_size") is None:
        if values.get("target_downsample_size") is not None:
            problems.append(
                Problem(f"{where}.target_downsample_size", "needs maximum_image_size; set both or neither.")
            )
        return
    target = both.get("target_downsample_size")
    if target is None:
        problems.append(Problem(f"{where}.maximum_image_size", "needs target_downsample_size; set both or neither."))
    elif both.number("target_downsample_size", 0) < both.number("resolution", 0):
        message = "is smaller than resolution; pictures would be shrunk below the size they are cropped to."
        problems.append(Problem(f"{where}.target_downsample_size", message))
    elif both.number("maximum_image_size", 0) < both.number("minimum_image_size", 0):
        problems.append(Problem(f"{where}.maximum_image_size", "is smaller than minimum_image_size; no picture fits."))
