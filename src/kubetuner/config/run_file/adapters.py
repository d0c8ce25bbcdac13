"""The adapter of ``model_type: lora``: LoRA and DoRA from flat keys, LoKr and LoHa from ``lycoris_config``.

``lycoris_config`` is LyCORIS's own JSON. What it asks for is done by PEFT, so what PEFT has no form of is refused.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kubetuner.config.keys import Key, Later, Rule, Schema, Unneeded, Values, one_of, read
from kubetuner.config.sections.adapter import FULL_MATRIX_RANK, LoraSettings
from kubetuner.errors import Problem

LORA_KEYS = (
    "lora_rank", "lora_alpha", "lora_dropout", "lora_init_type", "peft_lora_target_modules", "lora_type", "use_dora",
    "init_lora", "lycoris_config",
)  # fmt: skip
LOFTQ = (
    "LoftQ rounds the base's weights to 4 bits and corrects for that, so its adapter is right on the rounded base "
    "only and could not be loaded onto the published one."
)

_STANDARD_ONLY = ("lora_rank", "lora_alpha", "lora_dropout", "lora_init_type", "peft_lora_target_modules", "use_dora")
_FROM_WEIGHTS = ("olora", "pissa")
_OTHER_ALGORITHMS = frozenset({"full", "ia3", "dylora", "diag-oft", "boft", "tlora"})
_LORA_ITSELF = "that is a LoRA, which lora_type standard trains (lora_rank, lora_alpha)."
_DEFAULT_CLASSES = ("Attention",)

_LYCORIS_RULES: dict[str, Rule] = {
    "algo": Key(
        "str",
        one_of("lokr", "loha"),
        later=_OTHER_ALGORITHMS,
        refused={"lora": _LORA_ITSELF, "locon": _LORA_ITSELF},
        nullable=False,
    ),
    "linear_dim": Key("int", low=1),
    "linear_alpha": Key("float", above=0),
    "full_matrix": Key("bool"),
    "factor": Key("int", low=-1),
    "decompose_both": Key("bool"),
    "use_tucker": Key("bool"),
    "rank_dropout": Key("float", low=0, high=1),
    "module_dropout": Key("float", low=0, high=1),
    "apply_preset": Key("json"),
    "multiplier": Later("an adapter's multiplier is", (1,)),
    "dropout": Later("dropout of the input (PEFT has rank_dropout and module_dropout for LyCORIS) is", (0,)),
    "rank_dropout_scale": Later("scaling with rank_dropout is", (False,)),
    "conv_dim": Later("another rank for convolutions is"),
    "conv_alpha": Later("another alpha for convolutions is"),
    "use_scalar": Later("a trained scalar (PEFT has none) is", (False,)),
    "weight_decompose": Later("DoRA of a LyCORIS adapter (PEFT has it for LoRA: use_dora) is", (False,)),
    "dora_wd": Later("DoRA of a LyCORIS adapter (PEFT has it for LoRA: use_dora) is", (False,)),
    "rs_lora": Later("rank-stabilised scaling is", (False,)),
    "train_norm": Later("training of norms is", (False,)),
    "unbalanced_factorization": Later("an unbalanced factorisation is", (False,)),
    "bypass_mode": Unneeded("bool", "the result is the same either way"),
    "lora_prefix": Unneeded("str", "tensors have PEFT's names"),
}
_PRESET_RULES: dict[str, Rule] = {
    "target_module": Key("texts"),
    "target_name": Later("choosing layers by patterns of names is"),
    "module_algo_map": Key("json"),
    "name_algo_map": Later("settings by patterns of names (PEFT has one setting for all layers) is"),
    "exclude_name": Later("leaving out layers by name is"),
    "enable_conv": Later("leaving out convolutions is", (True,)),
}
_MAP_RULES: dict[str, Rule] = {name: _LYCORIS_RULES[name] for name in ("algo", "factor", "linear_dim", "linear_alpha")}
_LYCORIS = Schema(_LYCORIS_RULES, {})
_PRESET = Schema(_PRESET_RULES, {})
_MAP = Schema(_MAP_RULES, {})


def read_adapter(values: Values, where: str, cwd: Path, problems: list[Problem]) -> LoraSettings:
    """The adapter that the keys of ``config.json`` describe.

    Args:
        values: The checked keys of ``config.json``.
        where: Its name for messages.
        cwd: Folder that the path of ``lycoris_config`` is relative to.
        problems: Receives one entry per fault.
    """
    if values.text("lora_type", "standard") == "lycoris":
        return _lycoris(values, where, cwd, problems)
    if "lycoris_config" in values:
        problems.append(Problem(f"{where}.lycoris_config", "has no effect; set lora_type to lycoris or remove it."))
    rank = values.integer("lora_rank", 16)
    init_type = values.text("lora_init_type", "default")
    init_lora, dora = values.text("init_lora"), values.flag("use_dora")
    if init_lora and init_type != "default":
        problems.append(Problem(f"{where}.lora_init_type", "has no effect with init_lora; remove one of them."))
    if dora and init_type in _FROM_WEIGHTS:
        message = f"is {init_type!r}, which has no form with use_dora, whose magnitudes are those of the whole base."
        problems.append(Problem(f"{where}.lora_init_type", message))
    return LoraSettings.model_validate(
        {
            "rank": rank,
            "alpha": values.number("lora_alpha", float(rank)),
            "dropout": values.number("lora_dropout", 0.0 if init_type in _FROM_WEIGHTS else 0.1),
            "init_type": init_type,
            "use_dora": dora,
            "target_modules": values.texts("peft_lora_target_modules"),
            "init_lora": init_lora,
        }
    )


def _lycoris(values: Values, where: str, cwd: Path, problems: list[Problem]) -> LoraSettings:
    """LoKr or LoHa; the default settings where ``problems`` says that there is none."""
    message = "has no effect with lora_type lycoris, which takes its settings from lycoris_config; remove it."
    problems.extend(Problem(f"{where}.{name}", message) for name in _STANDARD_ONLY if name in values)
    mapping, place = _mapping(values, where, cwd, problems)
    if mapping is None:
        return LoraSettings()
    before = len(problems)
    given = read(mapping, _LYCORIS, place, problems)
    if "algo" not in mapping:
        problems.append(Problem(f"{place}.algo", "is missing; expected 'lokr' or 'loha'."))
    classes, overrides = _preset(given, place, problems)
    if len(problems) > before:
        return LoraSettings()
    algorithm = overrides.text("algo", given.text("algo"))
    rank = overrides.integer("linear_dim", given.integer("linear_dim", 4))
    full = given.flag("full_matrix") or rank >= FULL_MATRIX_RANK
    rank = max(rank, FULL_MATRIX_RANK) if full else rank
    alpha = overrides.number("linear_alpha", given.number("linear_alpha", float(rank)))
    _check_algorithm(given, algorithm, rank, alpha, place, problems)
    return LoraSettings.model_validate(
        {
            "algorithm": algorithm,
            "rank": rank,
            "alpha": float(rank) if algorithm == "lokr" else alpha,
            "dropout": 0.0,
            "target_classes": classes,
            "factor": overrides.integer("factor", given.integer("factor", -1)),
            "decompose_both": given.flag("decompose_both"),
            "tucker": given.flag("use_tucker"),
            "rank_dropout": given.number("rank_dropout", 0.0),
            "module_dropout": given.number("module_dropout", 0.0),
            "init_lora": values.text("init_lora"),
        }
    )


def _mapping(values: Values, where: str, cwd: Path, problems: list[Problem]) -> tuple[Mapping[str, object] | None, str]:
    """The LyCORIS settings and what to call them in messages."""
    given, place = values.json("lycoris_config"), f"{where}.lycoris_config"
    if given is None:
        example = '{"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 16}'
        problems.append(Problem(place, f"is missing; lora_type lycoris needs a JSON file or an object like {example}."))
        return None, place
    if isinstance(given, Mapping):
        return given, place
    if not isinstance(given, str):
        message = f"is {json.dumps(given)}; expected the path of a JSON file, or an object."
        problems.append(Problem(place, message))
        return None, place
    path = cwd / given
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(Problem(place, f"{path} cannot be read ({error.strerror}); expected a JSON file."))
        return None, place
    except ValueError as error:
        problems.append(Problem(place, f"{path} is not JSON ({error})."))
        return None, place
    if not isinstance(value, dict):
        problems.append(Problem(place, f"{path} holds a {type(value).__name__}; expected an object."))
        return None, place
    return value, path.name


def _preset(given: Values, where: str, problems: list[Problem]) -> tuple[tuple[str, ...], Values]:
    """The classes whose layers get an adapter, and the settings that ``module_algo_map`` gives all of them."""
    preset, place = given.json("apply_preset"), f"{where}.apply_preset"
    if preset is None:
        return _DEFAULT_CLASSES, Values({})
    if not isinstance(preset, Mapping):
        problems.append(Problem(place, f"is {preset!r}; expected an object."))
        return _DEFAULT_CLASSES, Values({})
    chosen = read(preset, _PRESET, place, problems)
    classes = chosen.texts("target_module") or _DEFAULT_CLASSES
    table = chosen.json("module_algo_map") if "module_algo_map" in chosen else {}
    rows = {name: row for name, row in table.items() if isinstance(row, Mapping)} if isinstance(table, Mapping) else {}
    if not isinstance(table, Mapping) or len(rows) < len(table):
        problems.append(Problem(f"{place}.module_algo_map", "is not understood; expected an object of objects."))
        return classes, Values({})
    return classes, _shared(rows, classes, given, f"{place}.module_algo_map", problems)


def _shared(
    table: Mapping[str, Mapping[str, object]],
    classes: Sequence[str],
    given: Values,
    where: str,
    problems: list[Problem],
) -> Values:
    """What the table says of every class: PEFT has one setting for all layers, so they must agree."""
    read_rows = {name: read(row, _MAP, f"{where}.{name}", problems) for name, row in table.items()}
    unknown = sorted(set(read_rows) - set(classes))
    if unknown:
        message = f"names {', '.join(unknown)}, which target_module does not; add it there or remove it here."
        problems.append(Problem(where, message))
    shared = {}
    for key in _MAP_RULES:
        by_class = {name: read_rows.get(name, Values({})).get(key) or given.get(key) for name in classes}
        if len(set(by_class.values())) > 1:
            said = ", ".join(f"{name} {value}" for name, value in by_class.items())
            message = f"gives classes another {key} ({said}); PEFT has one for all layers: give them the same."
            problems.append(Problem(where, message))
        value = by_class[classes[0]]
        if value is not None:
            shared[key] = value
    return Values(shared)


def _check_algorithm(
    given: Values, algorithm: str, rank: int, alpha: float, where: str, problems: list[Problem]
) -> None:
    if given.get("factor") == 0:
        problems.append(Problem(f"{where}.factor", "is 0; expected -1 (as square as possible) or at least 1."))
    if algorithm == "lokr":
        if rank < FULL_MATRIX_RANK and alpha != rank:
            message = (
                f"is {alpha:g} and linear_dim is {rank}; a LoKr needs them equal, since loaders drop its alpha. "
                f"Set linear_alpha to {rank} (and scale learning_rate), or full_matrix to true."
            )
            problems.append(Problem(f"{where}.linear_alpha", message))
        return
    for name in ("factor", "decompose_both", "full_matrix"):
        if name in given and given.get(name) not in (False, -1):
            problems.append(Problem(f"{where}.{name}", "has no effect with algo loha; remove it."))
    if rank >= FULL_MATRIX_RANK:
        problems.append(Problem(f"{where}.linear_dim", f"is {rank}; a LoHa needs a low rank, like 8."))
