import pytest

from kubetuner.config.compilation import CompileSettings, missing_compiler
from kubetuner.config.load import load
from kubetuner.errors import ConfigError

DATA = [{"id": "a", "instance_data_dir": "pictures"}]
OFF = {"dynamo_mode": "", "dynamo_dynamic": False, "dynamo_fullgraph": False, "dynamo_use_regional_compilation": False}


def compilation_of(family="sdxl", **config):
    return load({"model_type": "full", "model_family": family, **config}, DATA).sections.train.compilation


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"dynamo_backend": "no", **OFF}, None),
        ({"dynamo_backend": "inductor"}, CompileSettings(backend="inductor", regional=True)),
        ({"dynamo_backend": "aot_eager", **OFF}, CompileSettings(backend="aot_eager", regional=False)),
        (
            {"dynamo_backend": "inductor", "dynamo_mode": "max-autotune-no-cudagraphs", "dynamo_fullgraph": True},
            CompileSettings(backend="inductor", mode="max-autotune-no-cudagraphs", fullgraph=True),
        ),
        ({"dynamo_backend": "inductor", "dynamo_dynamic": True}, CompileSettings(backend="inductor", dynamic=True)),
    ],
)
def test_the_keys_are_read(config, expected) -> None:
    assert compilation_of(**config) == expected


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        ({"dynamo_backend": "cudagraphs"}, "dynamo_backend", "not available yet"),
        ({"dynamo_backend": "induktor"}, "dynamo_backend", "expected 'no' or 'inductor'"),
        ({"dynamo_backend": "inductor", "dynamo_mode": "reduce-overhead"}, "dynamo_mode", "not available yet"),
        ({"dynamo_backend": "eager", "dynamo_mode": "max-autotune-no-cudagraphs"}, "dynamo_mode", "has no effect with"),
        (
            {"dynamo_backend": "eager", "dynamo_use_regional_compilation": False, "fsdp_enable": True},
            "dynamo_use_regional_compilation",
            "compiled one by one",
        ),
        ({"dynamo_fullgraph": True}, "dynamo_fullgraph", "needs dynamo_backend"),
        ({"dynamo_use_regional_compilation": True}, "dynamo_use_regional_compilation", "needs dynamo_backend"),
        (
            {"dynamo_backend": "inductor", "dynamo_dynamic": True, "model_family": "sana"},
            "dynamo_dynamic",
            "fails on Sana's blocks",
        ),
        (
            {"dynamo_backend": "eager", "model_type": "lora", "base_model_precision": "nf4-bnb"},
            "dynamo_backend",
            "over base_model_precision 'nf4-bnb' is not available yet",
        ),
    ],
)
def test_what_would_not_work_is_refused(config, key, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compilation_of(**config)
    assert [problem.where for problem in caught.value.problems] == [f"config.json.{key}"]


def test_inductor_alone_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_compiler(CompileSettings(backend="inductor")) == "no-such-compiler"
    assert missing_compiler(CompileSettings(backend="aot_eager")) == ""
    assert missing_compiler(None) == ""
