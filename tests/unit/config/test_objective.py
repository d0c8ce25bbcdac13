import pytest

from kubetuner.config.load import load
from kubetuner.config.sections.objective import EmaSettings, LossSettings, NoiseSettings, SchedulerChange, TimestepBias
from kubetuner.errors import ConfigError

DATA = [{"id": "a", "instance_data_dir": "pictures"}]


def train_of(family="sdxl", **config):
    return load({"model_type": "full", "model_family": family, **config}, DATA).sections.train


def problems_of(family="sdxl", **config):
    with pytest.raises(ConfigError) as caught:
        train_of(family, **config)
    return {problem.where.removeprefix("config.json."): problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        ({}, LossSettings()),
        ({"snr_gamma": 5}, LossSettings(snr_gamma=5.0)),
        ({"snr_weight": 0.5}, LossSettings(snr_weight=0.5)),
        ({"use_soft_min_snr": True, "soft_min_snr_sigma_data": 0.5}, LossSettings(soft_sigma_data=0.5)),
        ({"use_soft_min_snr": True, "snr_gamma": 4}, LossSettings(soft_sigma_data=0.5)),
        ({"loss_type": "huber", "huber_c": 0.2}, LossSettings(type="huber", huber_c=0.2)),
        (
            {"loss_type": "smooth_l1", "huber_schedule": "exponential"},
            LossSettings(type="smooth_l1", huber_schedule="exponential"),
        ),
    ],
)
def test_losses(config, loss) -> None:
    assert train_of(**config).loss == loss


def test_noise_and_bias() -> None:
    train = train_of(
        offset_noise=True, noise_offset=0.05, input_perturbation=0.1, input_perturbation_steps=9,
        timestep_bias_strategy="range", timestep_bias_begin=200, timestep_bias_end=500, timestep_bias_multiplier=3,
    )  # fmt: skip
    assert train.noise == NoiseSettings(offset=0.05, offset_probability=0.25, perturbation=0.1, perturbation_steps=9)
    assert train.timestep_bias == TimestepBias(strategy="range", multiplier=3.0, begin=200, end=500)
    assert train.process().bias == train.timestep_bias


def test_zero_terminal_snr_reaches_training_and_evaluation_but_not_the_caches() -> None:
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    sections = load({"model_type": "full", "model_family": "sdxl", **config}, DATA).sections
    change = SchedulerChange(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert sections.train.model.scheduler == sections.evaluate.model.scheduler == change
    assert sections.cache_vae.model.scheduler == sections.cache_text_embeds.model.scheduler == SchedulerChange()


def test_flow_densities() -> None:
    flow = train_of(
        "sana", flow_use_beta_schedule=True, flow_beta_schedule_alpha=3.0, flow_schedule_auto_shift=True
    ).flow
    assert (flow.density, flow.beta_alpha, flow.beta_beta, flow.auto_shift) == ("beta", 3.0, 2.0, True)
    plain = train_of("sana").flow
    assert (plain.density, plain.sigmoid_scale, plain.shift) == ("logit_normal", 1.0, 3.0)


@pytest.mark.parametrize(
    ("written", "sigmas"),
    [
        ("801,694, 338", (0.801, 0.694, 0.338)),
        ([1000, 2], (1.0, 0.002)),
        ([0.25, 1], (0.25, 1.0)),
        ("0.5", (0.5,)),
        (500, (0.5,)),
    ],
)
def test_custom_timesteps(written, sigmas) -> None:
    flow = train_of("sana", flow_custom_timesteps=written, flow_schedule_shift=3.0).flow
    assert (flow.sigmas, flow.in_turn) == (sigmas, False)
    assert train_of("sana", flow_custom_timesteps=written, flow_timesteps_mode="round-robin").flow.in_turn


def test_a_scaled_learning_rate_is_that_of_all_pictures_of_a_step() -> None:
    config = {"learning_rate": 1e-5, "train_batch_size": 8, "gradient_accumulation_steps": 2, "lr_scale": True}
    assert train_of(**config).learning_rate == pytest.approx(16e-5)
    assert train_of(**config, lr_scale_sqrt=True).learning_rate == pytest.approx(4e-5)
    assert train_of(**config, num_train_processes=3).learning_rate == pytest.approx(48e-5)
    assert train_of(lr_scale=True).learning_rate == pytest.approx(4 * 4e-7)  # The default batch of the default rate.


def test_averaging() -> None:
    assert train_of().ema is None
    config = {"use_ema": True, "ema_update_interval": 4, "ema_device": "accelerator", "ema_validation": "ema_only"}
    assert train_of(**config).ema == EmaSettings(decay=0.995, update_interval=4, device="accelerator")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch-adamw", (0.9, 0.999, 0.01, 1e-8, 4e-7, 2.0)),
        ("optimi-adamw", (0.9, 0.99, 0.0, 1e-6, 4e-7, 2.0)),
        ("optimi-lion", (0.9, 0.99, 0.0, 1e-8, 4e-7, 2.0)),
        ("optimi-stableadamw", (0.9, 0.99, 0.0, 1e-6, 4e-7, 0.0)),
        ("prodigy", (0.9, 0.999, 0.0, 1e-8, 1.0, 0.0)),
    ],
)
def test_an_optimizer_has_its_own_defaults(name, expected) -> None:
    train = train_of(optimizer=name)
    assert (
        train.adam_beta1, train.adam_beta2, train.adam_weight_decay, train.adam_epsilon, train.learning_rate,
        train.max_grad_norm,
    ) == expected  # fmt: skip


def test_optimizer_config_is_typed() -> None:
    train = train_of(optimizer="prodigy", optimizer_config="weight_decay=0.1, d_coef=2, safeguard_warmup=True")
    assert train.adam_weight_decay == 0.1
    assert train.optimizer_options == {"d_coef": 2.0, "safeguard_warmup": True}
    assert train_of(optimizer="adafactor").optimizer == "torch-adafactor"


def test_what_simpletuner_writes_for_not_chosen_is_accepted() -> None:
    written = {
        "snr_gamma": 0, "snr_weight": 1.0, "huber_c": 0.1, "noise_offset": 0.1, "noise_offset_probability": 0.25,
        "timestep_bias_portion": 0.25, "timestep_bias_end": 1000, "flow_schedule_auto_shift": False,
        "flow_use_beta_schedule": False, "use_ema": False, "ema_decay": 0.995, "ema_validation": "comparison",
        "training_scheduler_timestep_spacing": "trailing", "lr_num_cycles": 1,
    }  # fmt: skip
    assert train_of(**written) == train_of()
    assert train_of("sana", **written) == train_of("sana")


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        ({"snr_gamma": 5, "snr_weight": 0.5}, "snr_weight", "no effect with min-SNR"),
        ({"use_soft_min_snr": True}, "use_soft_min_snr", "needs soft_min_snr_sigma_data or snr_gamma"),
        ({"soft_min_snr_sigma_data": 1.0}, "soft_min_snr_sigma_data", "needs use_soft_min_snr"),
        (
            {"use_soft_min_snr": True, "soft_min_snr_sigma_data": 1.0, "snr_gamma": 5},
            "soft_min_snr_sigma_data",
            "keep one",
        ),
        ({"huber_c": 0.2}, "huber_c", "no effect with loss_type l2"),
        ({"loss_type": "l1"}, "loss_type", "expected 'l2' or 'huber' or 'smooth_l1'"),
        ({"input_perturbation_steps": 5}, "input_perturbation_steps", "needs input_perturbation"),
        ({"timestep_bias_strategy": "later"}, "timestep_bias_multiplier", "prefers no timestep"),
        (
            {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 2, "timestep_bias_begin": 5},
            "timestep_bias_begin",
            "no effect",
        ),
        (
            {
                "timestep_bias_strategy": "range", "timestep_bias_multiplier": 2, "timestep_bias_begin": 600,
                "timestep_bias_end": 500,
            },
            "timestep_bias_begin",
            "not below",
        ),
        ({"prediction_type": "sample"}, "prediction_type", "not available yet"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr", "v_prediction"),
        (
            {"rescale_betas_zero_snr": True, "inference_scheduler_timestep_spacing": "leading"},
            "inference_scheduler_timestep_spacing",
            "trailing",
        ),
        ({"flow_use_beta_schedule": True}, "flow_use_beta_schedule", "trains no flow"),
        ({"family": "sana", "snr_gamma": 5}, "snr_gamma", "flow-matching"),
        ({"family": "sana", "offset_noise": True}, "offset_noise", "flow-matching"),
        ({"family": "sana", "flow_beta_schedule_beta": 3}, "flow_beta_schedule_beta", "needs flow_use_beta_schedule"),
        (
            {"family": "sana", "flow_use_beta_schedule": True, "flow_use_uniform_schedule": True},
            "flow_use_beta_schedule",
            "keep one",
        ),
        (
            {"family": "sana", "flow_schedule_auto_shift": True, "flow_schedule_shift": 3},
            "flow_schedule_auto_shift",
            "keep one",
        ),
        ({"ema_decay": 0.99}, "ema_decay", "needs use_ema"),
        ({"use_ema": True, "ema_validation": "comparison"}, "ema_validation", "not available yet"),
        ({"use_ema": True, "ema_cpu_only": True, "ema_device": "accelerator"}, "ema_cpu_only", "keep one"),
        ({"optimizer": "optimi-lion", "adam_epsilon": 1e-6}, "adam_epsilon", "no effect with optimizer optimi-lion"),
        ({"optimizer_config": "momentum=0.9"}, "optimizer_config", "beta1, beta2, weight_decay, eps, amsgrad"),
        ({"optimizer_config": "weight_decay=-1"}, "optimizer_config", "a number at least 0"),
        ({"optimizer_config": "amsgrad=1"}, "optimizer_config", "true or false"),
        ({"optimizer_config": "beta2=0.9,beta2=0.8"}, "optimizer_config", "twice"),
        ({"optimizer_config": "beta2=1.0"}, "optimizer_config", "below 1"),
        ({"optimizer_config": "beta2=0.9", "adam_beta2": 0.9}, "adam_beta2", "keep one"),
        ({"lr_num_cycles": 2}, "lr_num_cycles", "no effect with lr_scheduler"),
        ({"lr_scheduler": "sine", "lr_power": 2}, "lr_power", "no effect with lr_scheduler sine"),
        ({"lr_scheduler": "sine", "lr_end": 1e-3}, "lr_end", "not below learning_rate"),
        ({"lr_scale_sqrt": True}, "lr_scale_sqrt", "needs lr_scale"),
        ({"lr_scale": True, "optimizer": "prodigy"}, "lr_scale", "prodigy finds the rate itself"),
        ({"flow_custom_timesteps": [500]}, "flow_custom_timesteps", "trains no flow"),
        ({"family": "sana", "flow_timesteps_mode": "round-robin"}, "flow_timesteps_mode", "needs flow_custom"),
        ({"family": "sana", "flow_custom_timesteps": [0.5, 500]}, "flow_custom_timesteps", "mixes both"),
        *(
            ({"family": "sana", "flow_custom_timesteps": wrong}, "flow_custom_timesteps", "expected numbers")
            for wrong in ("801;694", [], [0], [1001], [0.5, True], {"a": 1}, [[1]], "", ["nan"])
        ),
        (
            {"family": "sana", "flow_custom_timesteps": [500], "flow_schedule_shift": 6},
            "flow_schedule_shift",
            "no effect with flow_custom_timesteps",
        ),
        ({"nonfinite_loss": "ignore"}, "nonfinite_loss", "'stop' or 'skip'"),
    ],
)  # fmt: skip
def test_refused(config, key, message) -> None:
    found = problems_of(**config)
    assert list(found) == [key]
    assert message in found[key]
