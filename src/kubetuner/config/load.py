"""The two JSON files to one checked :class:`RunConfig`; every problem is reported at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kubetuner.config.build import build_sections, read_base
from kubetuner.config.data_file.entries import Data, read_data
from kubetuner.config.json_file import read_json
from kubetuner.config.keys import Values, plain_name, read
from kubetuner.config.models import OUTLINES
from kubetuner.config.run_file.keys import RUN_SCHEMA
from kubetuner.config.sections.steps import Sections
from kubetuner.errors import ConfigError, InputError, Problem

CONFIG_NAME = "config.json"
DATA_NAME = "multidatabackend.json"


@dataclass(frozen=True)
class RunConfig:
    """A run as the two files describe it, before anything outside them was looked at.

    Attributes:
        sections: Settings by step; revisions and local paths are not resolved.
        data: The enabled entries with their places in the file.
        output_dir: Where a local run puts its artifacts; empty when not set.
        notes: Keys that were accepted and have no effect here, with the reason.
        report_to: ``none`` or ``mlflow``; empty when not set.
        tracker_project_name: Name of the MLflow experiment; empty when not set.
        tracker_run_name: Name of the run; empty when not set.
        allow_dataset_oversubscription: Whether the plan raises ``repeats`` of datasets that fill no batch.
    """

    sections: Sections
    data: Data
    output_dir: str = ""
    notes: tuple[str, ...] = ()
    report_to: str = ""
    tracker_project_name: str = ""
    tracker_run_name: str = ""
    allow_dataset_oversubscription: bool = False


def apply_overrides(config: Mapping[str, object], overrides: Sequence[str]) -> dict[str, object]:
    """``config`` with each ``key=value`` set; a value is read as JSON and, where it is none, as a string.

    Raises:
        ConfigError: An override has no ``=`` or no key.
    """
    changed = dict(config)
    problems = []
    for override in overrides:
        key, separator, text = override.partition("=")
        name = plain_name(key)
        if not separator or not name:
            problems.append(Problem("--set", f"is {override!r}; expected key=value."))
            continue
        name = RUN_SCHEMA.aliases[name].to if name in RUN_SCHEMA.aliases and name != "use_bitfit" else name
        for written in [written for written in changed if _present_name(written) == name]:
            del changed[written]
        try:
            changed[name] = json.loads(text)
        except ValueError:
            changed[name] = text
    if problems:
        raise ConfigError(problems)
    return changed


def _present_name(written: str) -> str:
    name = plain_name(written)
    return RUN_SCHEMA.aliases[name].to if name in RUN_SCHEMA.aliases else name


def load(
    config: Mapping[str, object],
    data: Sequence[object] | None = None,
    *,
    config_name: str = CONFIG_NAME,
    data_name: str = DATA_NAME,
    cwd: Path = Path(),
) -> RunConfig:
    """Check both files against each other and SimpleTuner's schema.

    Args:
        config: The object in ``config.json``.
        data: The list in ``multidatabackend.json``; read from ``data_backend_config`` when ``None``.
        config_name: Name of the first file for messages.
        data_name: Name of the second file for messages.
        cwd: Folder that the paths in the files are relative to.

    Raises:
        ConfigError: With every problem that was found.
    """
    problems: list[Problem] = []
    values = read(config, RUN_SCHEMA, config_name, problems)
    for name in ("model_type", "model_family"):
        if name not in values and not any(_present_name(p.where.rpartition(".")[2]) == name for p in problems):
            choices = "full or lora" if name == "model_type" else ", ".join(OUTLINES)
            problems.append(Problem(f"{config_name}.{name}", f"is missing; expected one of {choices}."))
    facts = {
        "model_type": values.text("model_type"),
        "model_family": values.text("model_family"),
        "output_dir": values.text("output_dir"),
    }
    if data is None:
        data, data_name = _data_file(values, cwd, config_name, problems)
    entries = Data() if data is None else read_data(data, values, data_name, problems, facts=facts, cwd=cwd)
    base = read_base(values, config_name, cwd, problems)
    if base is None:
        raise ConfigError(problems)
    sections = build_sections(base, entries, config_name, cwd, problems)
    if problems or sections is None:
        raise ConfigError(problems)
    return RunConfig(
        sections=sections,
        data=entries,
        output_dir=values.text("output_dir"),
        notes=(
            *(f"{config_name}.{note}" for note in (*values.notes, *_one_mask(values))),
            *entries.notes,
            *_never_drawn(entries, sections),
            *_not_scaled_by(values, entries, sections, config_name),
        ),
        report_to=values.text("report_to"),
        tracker_project_name=values.text("tracker_project_name"),
        tracker_run_name=values.text("tracker_run_name"),
        allow_dataset_oversubscription=values.flag("allow_dataset_oversubscription"),
    )


def _one_mask(values: Values) -> list[str]:
    name = "conditioning_multidataset_sampling"
    reason = "a dataset of pictures has one dataset of masks, so there is nothing to choose"
    return [f"`{name}`: {reason}"] if name in values else []


def _never_drawn(data: Data, sections: Sections) -> list[str]:
    """Datasets that a run shorter than their ``start_step`` does not reach."""
    steps = sections.train.max_train_steps
    return [
        f"{entry.where}.`start_step`: the run ends after step {steps}, so the dataset is never drawn from"
        for entry in data.of("image")
        if steps and entry.sampling.start_step > steps
    ]


def _not_scaled_by(values: Values, data: Data, sections: Sections, where: str) -> list[str]:
    """With ``lr_scale``, batch sizes that the learning rate does not follow: SimpleTuner's does not either."""
    size = sections.train.train_batch_size
    others = {
        entry.source.id: entry.sampling.train_batch_size
        for entry in data.of("image")
        if entry.sampling.train_batch_size not in (None, size)
    }
    if not others or not values.flag("lr_scale"):
        return []
    named = ", ".join(f"{other} of {name!r}" for name, other in others.items())
    return [f"{where}.`lr_scale`: the rate follows {where}'s train_batch_size {size}; {named} has no effect on it"]


def _data_file(values: Values, cwd: Path, where: str, problems: list[Problem]) -> tuple[Sequence[object] | None, str]:
    given = values.text("data_backend_config")
    if not given:
        problems.append(Problem(f"{where}.data_backend_config", "is missing; expected the path of the data file."))
        return None, DATA_NAME
    try:
        data = read_json(cwd / given)
    except InputError as error:
        problems.append(Problem(f"{where}.data_backend_config", str(error)))
        return None, DATA_NAME
    if not isinstance(data, list):
        problems.append(Problem(given, f"holds a {type(data).__name__}; expected a list of datasets."))
        return None, DATA_NAME
    return data, Path(given).name
