"""``train_batch_size`` and ``timestep_sampling_offset`` of a picture entry."""

from typing import Any

import pytest

from kubetuner.config.load import RunConfig, load
from kubetuner.errors import ConfigError

FLOW = {"model_type": "full", "model_family": "sana", "max_train_steps": 100}
DIFFUSION = {**FLOW, "model_family": "sdxl"}


def image(name: str = "a", **more: Any) -> dict[str, Any]:
    return {"id": name, "instance_data_dir": "pictures", **more}


def problem_of(config: dict[str, Any], entry: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(config, [image("first"), entry])
    (problem,) = caught.value.problems
    return problem.where.removeprefix("multidatabackend.json[1]."), problem.message


def notes_of(run: RunConfig) -> str:
    return "\n".join(run.notes)


def test_both_keys_reach_the_train_section() -> None:
    own = image(train_batch_size=8, timestep_sampling_offset=-0.5)
    train = load({**FLOW, "train_batch_size": 3}, [own, image("b")]).sections.train
    first, second = train.datasets
    assert (first.train_batch_size, first.timestep_sampling_offset) == (8, -0.5)
    assert (second.train_batch_size, second.timestep_sampling_offset) == (None, 0.0)
    assert [train.batch_size(dataset) for dataset in train.datasets] == [8, 3]
    assert train.batch_sizes == (3, 8)
    assert [train.process(dataset).offset for dataset in (None, first, second)] == [0.0, -0.5, 0.0]


@pytest.mark.parametrize(
    ("config", "entry", "expected"),
    [
        (FLOW, {"train_batch_size": 0}, "is 0; expected a whole number at least 1"),
        (FLOW, {"train_batch_size": "8"}, "expected a whole number at least 1, without quotes"),
        (FLOW, {"train_batch_size": 2, "dataset_type": "eval"}, "has no meaning with dataset_type eval"),
        (FLOW, {"timestep_sampling_offset": "1"}, "expected a number, without quotes"),
        (FLOW, {"timestep_sampling_offset": 1, "dataset_type": "eval"}, "has no meaning with dataset_type eval"),
        (DIFFUSION, {"timestep_sampling_offset": 1}, "has no effect with model_family sdxl, which trains no flow"),
        (
            {**FLOW, "flow_use_uniform_schedule": True},
            {"timestep_sampling_offset": 1},
            "has no effect with flow_use_uniform_schedule, which draws no normal values",
        ),
        (
            {**FLOW, "flow_use_beta_schedule": True},
            {"timestep_sampling_offset": 1},
            "has no effect with flow_use_beta_schedule, which draws no normal values",
        ),
        (
            {**FLOW, "flow_custom_timesteps": "100,500"},
            {"timestep_sampling_offset": 1},
            "has no effect with flow_custom_timesteps, which draws no normal values",
        ),
        (
            FLOW,
            {"timestep_sampling_offset": 200},
            "is 200, so that half of the noise levels would be above 0.999, noise alone: it counts in standard "
            "deviations, not in timesteps, and is at most 6.9 either way.",
        ),
        (
            {**FLOW, "flow_sigmoid_scale": 2},
            {"timestep_sampling_offset": -4},
            "below 0.001, without noise: it counts in standard deviations, not in timesteps, and is at most 3.5",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(config: dict[str, Any], entry: dict[str, Any], expected: str) -> None:
    where, message = problem_of(config, image(**entry))
    assert where in entry
    assert expected in message


@pytest.mark.parametrize("offset", [0, 0.0, None])
def test_no_offset_is_accepted_everywhere(offset: float | None) -> None:
    none = {"timestep_sampling_offset": offset}
    for config in (DIFFUSION, {**FLOW, "flow_use_uniform_schedule": True}):
        run = load(config, [image(**none), image("b", dataset_type="eval", **none)])
        assert run.sections.train.datasets[0].timestep_sampling_offset == 0.0


def test_masks_may_repeat_them() -> None:
    entries = [
        image(train_batch_size=2, timestep_sampling_offset=0.5, conditioning_data="m"),
        image("m", dataset_type="conditioning", conditioning_type="mask", train_batch_size=2,
              timestep_sampling_offset=0.5),
    ]  # fmt: skip
    notes = notes_of(load(FLOW, entries))
    assert "[1].`train_batch_size`: a mask is used whenever its picture is" in notes
    assert "[1].`timestep_sampling_offset`: a mask is used whenever its picture is" in notes


def test_a_scaled_rate_follows_the_run_files_batch_size_and_says_so() -> None:
    config = {**FLOW, "train_batch_size": 4, "learning_rate": 1e-5, "lr_scale": True}
    run = load(config, [image(train_batch_size=16), image("b", train_batch_size=4), image("c")])
    assert run.sections.train.learning_rate == pytest.approx(4e-5)
    said = "config.json.`lr_scale`: the rate follows config.json's train_batch_size 4; 16 of 'a' has no effect on it"
    assert said in run.notes
    assert "lr_scale" not in notes_of(load({**config, "lr_scale": False}, [image(train_batch_size=16)]))
    assert "lr_scale" not in notes_of(load(config, [image(train_batch_size=4)]))
