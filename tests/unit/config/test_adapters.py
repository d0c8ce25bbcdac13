"""Which adapter ``config.json`` describes, and what LyCORIS's own settings may ask for."""

import json
from pathlib import Path

import pytest

from kubetuner.config.load import load
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.errors import ConfigError

SDXL = {"model_type": "lora", "model_family": "sdxl", "max_train_steps": 1}
DATA = [{"id": "a", "instance_data_dir": "a", "resolution": 512, "resolution_type": "pixel"}]
GENERATED = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 16}},
    },
}


def adapter(cwd: Path = Path(), **keys: object) -> LoraSettings:
    lora = load(SDXL | keys, DATA, cwd=cwd).sections.train.lora
    assert lora is not None
    return lora


def lycoris(**settings: object) -> LoraSettings:
    return adapter(lora_type="lycoris", lycoris_config=settings)


def refusal(**keys: object) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(SDXL | keys, DATA)
    return {problem.where: problem.message for problem in caught.value.problems}


def test_alpha_follows_the_rank_and_dropout_the_start() -> None:
    assert adapter(lora_rank=4) == LoraSettings(rank=4, alpha=4.0, dropout=0.1)
    assert adapter(lora_init_type="pissa").dropout == 0.0
    assert adapter(lora_init_type="pissa", lora_dropout=0.2).dropout == 0.2
    assert adapter(use_dora=True).title == "DoRA"


def test_a_lokr_of_full_rank_has_no_alpha(tmp_path: Path) -> None:
    expected = LoraSettings(
        algorithm="lokr", rank=10000, alpha=10000.0, dropout=0.0, factor=16, target_classes=("Attention", "FeedForward")
    )
    assert lycoris(**GENERATED) == expected
    (tmp_path / "lycoris.json").write_text(json.dumps(GENERATED))
    assert adapter(tmp_path, lora_type="lycoris", lycoris_config="lycoris.json") == expected
    assert lycoris(algo="lokr", full_matrix=True, linear_dim=8, linear_alpha=1).full_rank


def test_low_ranks() -> None:
    lokr = lycoris(algo="lokr", linear_dim=8, linear_alpha=8, decompose_both=True, use_tucker=True)
    assert (lokr.rank, lokr.alpha, lokr.decompose_both, lokr.tucker) == (8, 8.0, True, True)
    assert lokr.target_classes == ("Attention",)
    loha = lycoris(algo="loha", linear_dim=8, linear_alpha=4, module_dropout=0.1)
    assert (loha.title, loha.rank, loha.alpha, loha.module_dropout) == ("LoHa", 8, 4.0, 0.1)


@pytest.mark.parametrize(
    ("settings", "where", "message"),
    [
        ({"linear_dim": 8}, "algo", "is missing"),
        ({"algo": "lora"}, "algo", "lora_type standard"),
        ({"algo": "diag-oft"}, "algo", "not available yet"),
        ({"algo": "lokr", "linear_dim": 8, "linear_alpha": 1}, "linear_alpha", "needs them equal"),
        ({"algo": "lokr", "factor": 0}, "factor", "at least 1"),
        ({"algo": "loha", "linear_dim": 10000}, "linear_dim", "low rank"),
        ({"algo": "loha", "factor": 8}, "factor", "no effect with algo loha"),
        ({"algo": "lokr", "dropout": 0.1}, "dropout", "rank_dropout"),
        ({"algo": "lokr", "weight_decompose": True}, "weight_decompose", "use_dora"),
        ({"algo": "lokr", "linear_rank": 8}, "linear_rank", "did you mean"),
        ({"algo": "lokr", "apply_preset": {"target_modul": "x"}}, "apply_preset.target_modul", "did you mean"),
        (
            {"algo": "lokr", "apply_preset": {"name_algo_map": {"x": {}}}},
            "apply_preset.name_algo_map",
            "PEFT has one setting",
        ),
        (
            {"algo": "lokr", "factor": 16, "apply_preset": {"target_module": ["Attention", "FeedForward"],
                                                            "module_algo_map": {"FeedForward": {"factor": 8}}}},
            "apply_preset.module_algo_map",
            "Attention 16, FeedForward 8",
        ),
        (
            {"algo": "lokr", "apply_preset": {"module_algo_map": {"ResBlock": {"factor": 8}}}},
            "apply_preset.module_algo_map",
            "names ResBlock",
        ),
    ],
)  # fmt: skip
def test_lycoris_settings_that_peft_has_no_form_of(settings: dict[str, object], where: str, message: str) -> None:
    found = refusal(lora_type="lycoris", lycoris_config=settings)
    assert list(found) == [f"config.json.lycoris_config.{where}"]
    assert message in found[f"config.json.lycoris_config.{where}"]


def test_keys_of_the_other_type_are_refused() -> None:
    found = refusal(lora_type="lycoris", lycoris_config={"algo": "lokr"}, lora_rank=4, use_dora=True)
    assert set(found) == {"config.json.lora_rank", "config.json.use_dora"}
    assert "rounded" in refusal(lora_init_type="loftq")["config.json.lora_init_type"]


@pytest.mark.parametrize("text", [None, "[]", "{"])
def test_a_bad_lycoris_file(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "lycoris.json").write_text(text)
    with pytest.raises(ConfigError, match=r"lycoris\.json"):
        adapter(tmp_path, lora_type="lycoris", lycoris_config="lycoris.json")


def test_values_that_are_no_objects_are_refused() -> None:
    said = refusal(lora_type="lycoris", lycoris_config=3)
    assert said == {"config.json.lycoris_config": "is 3; expected the path of a JSON file, or an object."}
    for preset, where in ((3, "apply_preset"), ({"module_algo_map": []}, "apply_preset.module_algo_map")):
        found = refusal(lora_type="lycoris", lycoris_config={"algo": "lokr", "apply_preset": preset})
        assert list(found) == [f"config.json.lycoris_config.{where}"]
