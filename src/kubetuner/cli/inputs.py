"""Read the two JSON files and the command line's overrides."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kubetuner.config.json_file import read_json
from kubetuner.config.keys import plain_name
from kubetuner.config.load import apply_overrides
from kubetuner.errors import InputError

DATA_KEY = "data_backend_config"


@dataclass(frozen=True)
class Inputs:
    """What a run is made from: the two files' contents, overrides applied, unchecked."""

    config: dict[str, object]
    data: list[object]


def read_inputs(config_file: Path, data_file: Path | None, overrides: Sequence[str]) -> Inputs:
    """Read both files; the second is the one ``data_backend_config`` names unless ``data_file`` is given.

    Raises:
        InputError: A file is missing or is not the JSON it should be.
    """
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise InputError(f"{config_file} holds a {type(config).__name__}; expected an object of settings.")
    config = apply_overrides(config, overrides)
    named = next((value for key, value in config.items() if plain_name(key) == DATA_KEY), None)
    if data_file is None and not isinstance(named, str):
        raise InputError(f"no data file: give --data FILE or set {DATA_KEY} in {config_file}.")
    path = data_file if data_file is not None else Path(str(named))
    data = read_json(path)
    if not isinstance(data, list):
        raise InputError(f"{path} holds a {type(data).__name__}; expected a list of datasets.")
    return Inputs(config, data)
