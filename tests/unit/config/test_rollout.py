import pytest

from kubetuner.config.load import load
from kubetuner.config.sections.objective import LossSettings, ReflexSettings, RolloutSettings
from tests.unit.config.test_objective import DATA, problems_of, train_of

P = "scheduled_sampling_"
ON = {f"{P}max_step_offset": 10, f"{P}probability": 0.5}
FLOW = {"diff2flow_enabled": True, "diff2flow_loss": True}


@pytest.mark.parametrize("family", ["pixart_sigma", "sdxl"])
def test_a_diffusion_family_has_no_reflex(family) -> None:
    assert train_of(family).rollout is None
    assert train_of(family, **ON).rollout == RolloutSettings(max_offset=10, probability=0.5, final_probability=0.5)


def test_reflexflow_is_a_flows_default() -> None:
    assert train_of("sana", **ON).rollout.reflex == ReflexSettings()
    assert train_of("sana", **ON, **{f"{P}reflexflow": False}).rollout.reflex is None
    weighted = {f"{P}reflexflow_alpha": 0, f"{P}reflexflow_beta1": 2, f"{P}reflexflow_beta2": 3}
    reflex = ReflexSettings(alpha=0.0, drift_weight=2.0, loss_weight=3.0)
    assert train_of("sana", **ON, **weighted).rollout.reflex == reflex


def test_a_ramp() -> None:
    ramp = {f"{P}max_step_offset": 5, f"{P}ramp_steps": 100, f"{P}start_step": 50, f"{P}ramp_shape": "cosine"}
    rollout = train_of(**ramp).rollout
    assert (rollout.probability, rollout.final_probability) == (0.0, 0.5)
    assert (rollout.ramp_steps, rollout.ramp_start, rollout.ramp_shape) == (100, 50, "cosine")
    rollout = train_of(**ramp, **{f"{P}prob_start": 0.1, f"{P}prob_end": 0.9}).rollout
    assert (rollout.probability, rollout.final_probability) == (0.1, 0.9)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, ("unipc", 2)),
        ({"order": 3}, ("unipc", 3)),
        ({"sampler": "dpm"}, ("dpm", 2)),
        ({"sampler": "euler"}, ("euler", 1)),
    ],
)
def test_samplers(chosen, expected) -> None:
    rollout = train_of(**ON, **{f"{P}{name}": value for name, value in chosen.items()}).rollout
    assert (rollout.sampler, rollout.order) == expected


@pytest.mark.parametrize("family", ["pixart_sigma", "sdxl"])
def test_diff2flow_changes_the_loss_alone(family) -> None:
    plain, changed = (
        load({"model_type": "full", "model_family": family, **config}, DATA).sections for config in ({}, FLOW)
    )
    assert changed.train.loss == LossSettings(diff2flow=True)
    assert changed.train.model_copy(update={"loss": LossSettings()}) == plain.train
    assert changed.evaluate == plain.evaluate  # The evaluation loss stays that of the noise; so does the sampler.
    assert train_of(family, **FLOW, **ON).rollout is not None


def test_what_simpletuner_writes_for_not_chosen_is_accepted() -> None:
    written = {
        f"{P}max_step_offset": 0, f"{P}strategy": "uniform", f"{P}probability": 0.0, f"{P}prob_start": 0.0,
        f"{P}prob_end": 0.5, f"{P}ramp_steps": 0, f"{P}start_step": 0.0, f"{P}ramp_shape": "linear",
        f"{P}sampler": "unipc", f"{P}order": 2, f"{P}reflexflow": None, f"{P}reflexflow_alpha": 1.0,
        f"{P}reflexflow_beta1": 10.0, f"{P}reflexflow_beta2": 1.0, "diff2flow_enabled": False, "diff2flow_loss": False,
    }  # fmt: skip
    for family in ("sdxl", "sana"):
        assert train_of(family, **written) == train_of(family)


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        ({f"{P}probability": 0.5}, f"{P}probability", "needs scheduled_sampling_max_step_offset above 0"),
        ({f"{P}max_step_offset": 10}, f"{P}max_step_offset", "scheduled_sampling_probability is 0"),
        ({**ON, f"{P}ramp_steps": 5}, f"{P}probability", "goes from prob_start to prob_end"),
        ({**ON, f"{P}prob_end": 0.9}, f"{P}prob_end", "needs scheduled_sampling_ramp_steps"),
        ({**ON, f"{P}start_step": 9}, f"{P}start_step", "needs scheduled_sampling_ramp_steps"),
        (
            {f"{P}max_step_offset": 1, f"{P}ramp_steps": 5, f"{P}prob_end": 0},
            f"{P}max_step_offset",
            "prob_start and prob_end are 0",
        ),
        ({**ON, f"{P}sampler": "rk4"}, f"{P}sampler", "not available yet"),
        ({**ON, f"{P}sampler": "dpm", f"{P}order": 3}, f"{P}order", "dpm has orders 1 and 2"),
        (
            {**ON, f"{P}sampler": "euler", f"{P}order": 3},
            f"{P}order",
            "no effect with scheduled_sampling_sampler euler",
        ),
        ({**ON, f"{P}reflexflow": True}, f"{P}reflexflow", "trains no flow"),
        (
            {"family": "sana", **ON, f"{P}reflexflow": False, f"{P}reflexflow_alpha": 2},
            f"{P}reflexflow_alpha",
            "needs scheduled_sampling_reflexflow",
        ),
        ({"family": "sana", "diff2flow_enabled": True}, "diff2flow_enabled", "flow-matching"),
        ({"diff2flow_enabled": True}, "diff2flow_enabled", "changes nothing by itself"),
        ({"diff2flow_loss": True}, "diff2flow_loss", "needs diff2flow_enabled"),
        ({**FLOW, "snr_gamma": 5}, "snr_gamma", "no effect with diff2flow_loss"),
        ({**FLOW, "loss_type": "huber"}, "loss_type", "no effect with diff2flow_loss"),
        ({**FLOW, "input_perturbation": 0.1}, "input_perturbation", "not possible with diff2flow_loss"),
    ],
)
def test_refused(config, key, message) -> None:
    found = problems_of(**config)
    assert list(found) == [key]
    assert message in found[key]
