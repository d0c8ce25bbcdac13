"""docs/config.md is what the schema says, and its defaults are what absent keys stand for."""

from pathlib import Path

import pytest

from kubetuner.config.keys import Key
from kubetuner.config.load import load
from kubetuner.config.reference import render
from kubetuner.config.run_file.keys import RUN_SCHEMA
from kubetuner.config.run_file.notes import NOTES
from kubetuner.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "config.md"
DATA = [{"id": "a", "instance_data_dir": "a"}]
LORA, FULL = {"model_type": "lora"}, {"model_type": "full"}
SCALED = {"lr_scheduler": "polynomial", "learning_rate": 1e-4}
# Where a key counts, when it does not in a plain run.
SETTINGS: list[dict[str, object]] = [
    *({"model_family": family, **kind} for family in ("pixart_sigma", "sdxl", "sana") for kind in (FULL, LORA)),
    {"model_family": "sdxl", **FULL, **SCALED},
    {"model_family": "sdxl", **FULL, "use_ema": True},
    {"model_family": "sdxl", **FULL, "loss_type": "huber"},
    {"model_family": "sdxl", **FULL, "offset_noise": True},
    {"model_family": "sdxl", **FULL, "input_perturbation": 0.1},
    {"model_family": "sdxl", **FULL, "timestep_bias_strategy": "later", "timestep_bias_multiplier": 2},
    {"model_family": "sdxl", **FULL, "timestep_bias_strategy": "range", "timestep_bias_multiplier": 2},
    {"model_family": "sana", **FULL, "flow_use_beta_schedule": True},
]


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run make docs"


def test_every_key_is_on_it() -> None:
    used = {name for name, rule in RUN_SCHEMA.rules.items() if isinstance(rule, Key)}
    assert set(NOTES) == used
    page = render()
    assert all(f"| `{name}` |" in page for name in [*RUN_SCHEMA.rules, *RUN_SCHEMA.aliases])
    assert all((note.default is None) == bool(note.otherwise) for note in NOTES.values())


@pytest.mark.parametrize("name", [name for name in NOTES if NOTES[name].default is not None])
def test_setting_a_default_changes_nothing(name: str) -> None:
    equal = []
    for settings in SETTINGS:
        if name in settings:
            continue
        try:
            equal.append(load({**settings, name: NOTES[name].default}, DATA) == load(settings, DATA))
        except ConfigError:  # It has no effect there, so it may not be set.
            continue
    assert equal, name
    assert all(equal)
