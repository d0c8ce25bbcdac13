"""The keys of ``config.json`` for training on several GPUs, and what of the rest goes together with them."""

from kubetuner.config.keys import Key, Later, Rule, Unneeded, Values
from kubetuner.config.sections.distribution import FsdpSettings
from kubetuner.config.sections.steps import TrainSection
from kubetuner.errors import Problem

_WRAP, _NO_WRAP = "TRANSFORMER_BASED_WRAP", "NO_WRAP"
_SHARDED_OPTIMIZERS = ("torch-adamw", "optimi-adamw", "optimi-lion")
# What SimpleTuner writes into a configuration when nothing was chosen: such a value asks for nothing.
_DEFAULTS: dict[str, object] = {
    "fsdp_version": 2,
    "fsdp_reshard_after_forward": True,
    "fsdp_auto_wrap_policy": _WRAP,
    "fsdp_transformer_layer_cls_to_wrap": "",
}

DISTRIBUTION_RULES: dict[str, Rule] = {
    "num_train_processes": Key("int", low=1),
    "num_machines": Key("int", low=1),
    "fsdp_enable": Key("bool"),
    "fsdp_version": Key("int", low=1, high=2),
    "fsdp_reshard_after_forward": Key("bool"),
    "fsdp_auto_wrap_policy": Key(
        "str",
        {_WRAP: _WRAP, _NO_WRAP: _NO_WRAP, _WRAP.lower(): _WRAP, _NO_WRAP.lower(): _NO_WRAP},
        refused={
            name: "FSDP2 shards every weight by itself, so blocks are chosen by class and not by size."
            for name in ("SIZE_BASED_WRAP", "size_based_wrap")
        },
    ),
    "fsdp_transformer_layer_cls_to_wrap": Key("texts"),
    "fsdp_state_dict_type": Unneeded(
        "str", "a checkpoint holds whole tensors, so any number of processes can go on from it"
    ),
    "fsdp_cpu_ram_efficient_loading": Later("loading the base in one process for all is", (False,)),
    "fsdp_offload_params": Later("sharded weights on the CPU are", (False,)),
    "context_parallel_size": Later("sharing one picture's tokens out is", (1,)),
    "context_parallel_comm_strategy": Later("sharing one picture's tokens out is", ("allgather",)),
    "seed_for_each_device": Unneeded("bool", "every micro-batch has random numbers of its own, on whatever device"),
}


def read_fsdp(values: Values, where: str, problems: list[Problem]) -> FsdpSettings | None:
    """The settings of FSDP2, or ``None`` without ``fsdp_enable``."""
    if not values.flag("fsdp_enable"):
        message = "has no effect without fsdp_enable; set that to true, or remove the key."
        chosen = (name for name, default in _DEFAULTS.items() if values.get(name) not in (None, default))
        problems.extend(Problem(f"{where}.{name}", message) for name in chosen)
        return None
    if values.integer("fsdp_version", 2) != 2:
        problems.append(Problem(f"{where}.fsdp_version", "is 1, which PyTorch has given up; set it to 2."))
    if values.integer("num_train_processes", 0) == 1 and values.integer("num_machines", 1) == 1:
        message = "has no effect with num_train_processes 1: there is nothing to share out; remove one of them."
        problems.append(Problem(f"{where}.fsdp_enable", message))
    named = values.texts("fsdp_transformer_layer_cls_to_wrap")
    classes = tuple(name.strip() for text in named for name in text.split(",") if name.strip())
    wraps = values.text("fsdp_auto_wrap_policy", _WRAP) == _WRAP
    if classes and not wraps:
        message = "has no effect with fsdp_auto_wrap_policy NO_WRAP; remove one of them."
        problems.append(Problem(f"{where}.fsdp_transformer_layer_cls_to_wrap", message))
    reshard = values.flag("fsdp_reshard_after_forward", True)
    return FsdpSettings(reshard_after_forward=reshard, wrap_blocks=wraps, block_classes=classes)


def check_fsdp(train: TrainSection, where: str, problems: list[Problem]) -> None:
    """What cannot be shared out."""
    if train.fsdp is None:
        return
    if train.optimizer not in _SHARDED_OPTIMIZERS:
        allowed = ", ".join(_SHARDED_OPTIMIZERS)
        message = (
            f"is {train.optimizer}, which looks at whole weights, or keeps its state in another form than they; with "
            f"fsdp_enable use one that treats every number by itself: {allowed}."
        )
        problems.append(Problem(f"{where}.optimizer", message))
    if train.base_model_precision != "no_change":
        message = f"is {train.base_model_precision!r}; rounded weights cannot be shared out: remove it or fsdp_enable."
        problems.append(Problem(f"{where}.base_model_precision", message))
    if train.lora is not None and train.lora.module_dropout > 0:
        message = (
            f"has module_dropout {train.lora.module_dropout:g}: processes would leave out different layers, and with "
            "fsdp_enable all must have gradients for the same ones; set it to 0, or remove fsdp_enable."
        )
        problems.append(Problem(f"{where}.lycoris_config", message))
    if train.compilation is not None and not train.compilation.regional:
        message = (
            "is false; with fsdp_enable weights are gathered between the blocks, so these are compiled one by one: set "
            "it to true, or remove it."
        )
        problems.append(Problem(f"{where}.dynamo_use_regional_compilation", message))
