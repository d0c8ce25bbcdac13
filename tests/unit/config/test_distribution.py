import pytest

from kubetuner.config.load import load
from kubetuner.config.sections.distribution import FsdpSettings
from kubetuner.errors import ConfigError

DATA = [{"id": "a", "instance_data_dir": "pictures"}]
KEPT = {"id": "b", "instance_data_dir": "others", "is_regularisation_data": True}
FSDP = {"fsdp_enable": True}
LOHA = {"lora_type": "lycoris", "lycoris_config": {"algo": "loha", "linear_dim": 4, "module_dropout": 0.5}}
QUANTISED = {"model_type": "lora", "base_model_precision": "int8-torchao"}


def run_of(**config):
    return load({"model_type": "full", "model_family": "sdxl", **config}, DATA)


def train_of(**config):
    return run_of(**config).sections.train


@pytest.mark.parametrize(
    ("config", "processes"),
    [({}, 0), ({"num_train_processes": 4}, 4), ({"--num_processes": 2}, 2), ({"num_train_processes": None}, 0)],
)
def test_how_many_processes(config, processes) -> None:
    assert train_of(**config).num_train_processes == processes


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, None),
        ({"fsdp_enable": False, "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}, None),
        (FSDP, FsdpSettings()),
        (FSDP | {"fsdp_reshard_after_forward": False}, FsdpSettings(reshard_after_forward=False)),
        (FSDP | {"fsdp_auto_wrap_policy": "no_wrap"}, FsdpSettings(wrap_blocks=False)),
        (FSDP | {"fsdp_transformer_layer_cls_to_wrap": "A, B"}, FsdpSettings(block_classes=("A", "B"))),
        (FSDP | {"fsdp_transformer_layer_cls_to_wrap": ["A", "B"]}, FsdpSettings(block_classes=("A", "B"))),
        (FSDP | {"model_type": "lora"}, FsdpSettings()),
        (FSDP | {"num_train_processes": 1, "num_machines": 2}, FsdpSettings()),
    ],
)
def test_fsdp(config, settings) -> None:
    assert train_of(**config).fsdp == settings


def test_the_form_of_checkpoints_is_no_choice() -> None:
    assert any("fsdp_state_dict_type" in note for note in run_of(**FSDP, fsdp_state_dict_type="FULL_STATE_DICT").notes)


def test_what_decides_is_the_batches_per_step_and_not_who_makes_them() -> None:
    four = train_of(num_train_processes=4, **FSDP)
    apart = train_of(num_train_processes=2, num_machines=2)
    one = train_of(gradient_accumulation_steps=4)
    assert four.deciding_with(4) == apart.deciding_with(4) == one.deciding_with(1) != train_of().deciding_with(1)
    assert four.planned_micro_steps == apart.planned_micro_steps == one.planned_micro_steps == 4


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        ({"num_train_processes": 0}, "num_train_processes", "at least 1"),
        ({"num_machines": 0}, "num_machines", "at least 1"),
        ({"fsdp_version": 1}, "fsdp_version", "no effect without fsdp_enable"),
        (FSDP | {"fsdp_version": 1}, "fsdp_version", "PyTorch has given up"),
        (FSDP | {"num_train_processes": 1}, "fsdp_enable", "no effect with num_train_processes 1"),
        (FSDP | {"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy", "by class and not by size"),
        (
            FSDP | {"fsdp_auto_wrap_policy": "NO_WRAP", "fsdp_transformer_layer_cls_to_wrap": "A"},
            "fsdp_transformer_layer_cls_to_wrap",
            "NO_WRAP",
        ),
        (FSDP | {"fsdp_cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading", "not available yet"),
        (FSDP | {"optimizer": "prodigy"}, "optimizer", "torch-adamw, optimi-adamw, optimi-lion"),
        (FSDP | QUANTISED, "base_model_precision", "cannot be shared out"),
        (FSDP | {"model_type": "lora"} | LOHA, "lycoris_config", "has module_dropout 0.5"),
        ({"context_parallel_size": 2}, "context_parallel_size", "not available yet"),
    ],
)
def test_refused(config, key, message) -> None:
    with pytest.raises(ConfigError) as caught:
        train_of(**config)
    problems = {problem.where.removeprefix("config.json."): problem.message for problem in caught.value.problems}
    assert list(problems) == [key]
    assert message in problems[key]


def test_sharding_goes_together_with_what_asks_the_network_twice() -> None:
    rollout = {"scheduled_sampling_max_step_offset": 9, "scheduled_sampling_probability": 0.5}
    config = {"model_type": "lora", "model_family": "sdxl", "dynamo_backend": "inductor", **rollout, **FSDP}
    train = load(config, [*DATA, KEPT]).sections.train
    assert (train.fsdp, train.rollout, train.compilation) != (None, None, None)
    assert [one.is_regularisation_data for one in train.datasets] == [False, True]
