"""Checked values of ``config.json`` to the settings of the training objective, with the checks between keys."""

from collections.abc import Sequence
from typing import Any

from kubetuner.config.keys import Values
from kubetuner.config.run_file.objective import DEFAULTS
from kubetuner.config.sections.objective import (
    EmaSettings,
    FlowSchedule,
    LossSettings,
    NoiseSettings,
    ReflexSettings,
    RolloutSettings,
    SchedulerChange,
    TimestepBias,
)
from kubetuner.errors import Problem

_DIFFUSION_KEYS = (
    "snr_gamma", "use_soft_min_snr", "soft_min_snr_sigma_data", "offset_noise", "noise_offset",
    "noise_offset_probability", "input_perturbation", "input_perturbation_steps", "prediction_type",
    "rescale_betas_zero_snr", "inference_scheduler_timestep_spacing", "timestep_bias_strategy", "timestep_bias_portion",
    "timestep_bias_multiplier", "timestep_bias_begin", "timestep_bias_end", "diff2flow_enabled", "diff2flow_loss",
)  # fmt: skip
_FLOW_KEYS = (
    "flow_schedule_auto_shift", "flow_use_beta_schedule", "flow_beta_schedule_alpha", "flow_beta_schedule_beta",
    "flow_custom_timesteps", "flow_timesteps_mode",
    "scheduled_sampling_reflexflow", "scheduled_sampling_reflexflow_alpha", "scheduled_sampling_reflexflow_beta1",
    "scheduled_sampling_reflexflow_beta2",
)  # fmt: skip
_DENSITY_KEYS = (
    "flow_schedule_shift", "flow_schedule_auto_shift", "flow_sigmoid_scale", "flow_use_uniform_schedule",
    "flow_use_beta_schedule", "flow_beta_schedule_alpha", "flow_beta_schedule_beta",
)  # fmt: skip
_REFLEX_KEYS = tuple(f"scheduled_sampling_reflexflow_{name}" for name in ("alpha", "beta1", "beta2"))
_RAMP_KEYS = tuple(f"scheduled_sampling_{name}" for name in ("prob_start", "prob_end", "start_step", "ramp_shape"))
_ROLLOUT_KEYS = (
    *(f"scheduled_sampling_{name}" for name in ("strategy", "probability", "ramp_steps", "sampler", "order")),
    *_RAMP_KEYS,
    "scheduled_sampling_reflexflow",
    *_REFLEX_KEYS,
)


class ObjectiveReader:
    """Reads the objective's settings for one family, noting every problem.

    Attributes:
        flow: Whether the family trains flow matching, and not diffusion.
    """

    def __init__(self, values: Values, flow: bool, where: str, problems: list[Problem]) -> None:
        self._values, self.flow, self._where, self._problems = values, flow, where, problems

    def refuse_foreign(self) -> None:
        """Keys of the other kind of family."""
        if self.flow:
            self._idle(_DIFFUSION_KEYS, "has no effect on a flow-matching family")
        else:
            self._idle(_FLOW_KEYS, "has no effect on a family that trains no flow")

    def scheduler(self) -> SchedulerChange:
        """``prediction_type``, ``rescale_betas_zero_snr`` and ``inference_scheduler_timestep_spacing``."""
        if self.flow:
            return SchedulerChange()
        prediction, zero = self._values.text("prediction_type"), self._values.get("rescale_betas_zero_snr")
        spacing = self._values.text("inference_scheduler_timestep_spacing")
        if zero is True and prediction == "epsilon":
            self._problem(
                "rescale_betas_zero_snr",
                "is true, but pure noise says nothing about a picture to a model that predicts noise; "
                "set prediction_type to v_prediction.",
            )
        if zero is True and spacing not in ("", "trailing"):
            message = f"is {spacing!r}; with rescale_betas_zero_snr pictures must start at the last timestep: trailing."
            self._problem("inference_scheduler_timestep_spacing", message)
        return SchedulerChange.model_validate(
            {
                "prediction_type": prediction,
                "rescale_betas_zero_snr": zero,
                "timestep_spacing": spacing or ("trailing" if zero is True else ""),
            }
        )

    def flow_schedule(self) -> FlowSchedule:
        """Density and shift of the sigmas, or the list that is in their place."""
        values = self._values
        if self.flow and "flow_custom_timesteps" in values:
            return self._listed_sigmas()
        self._idle(("flow_timesteps_mode",) if self.flow else (), "needs flow_custom_timesteps")
        uniform, beta = values.flag("flow_use_uniform_schedule"), values.flag("flow_use_beta_schedule")
        if uniform and beta:
            self._problem("flow_use_beta_schedule", "is true and so is flow_use_uniform_schedule; keep one of them.")
        if not beta:
            self._idle(("flow_beta_schedule_alpha", "flow_beta_schedule_beta"), "needs flow_use_beta_schedule")
        auto = values.flag("flow_schedule_auto_shift")
        if auto and values.number("flow_schedule_shift", 0.0) > 0:
            message = "is true, and flow_schedule_shift is set too; keep one of them."
            self._problem("flow_schedule_auto_shift", message)
        return FlowSchedule(
            density="beta" if beta else "uniform" if uniform else "logit_normal",
            sigmoid_scale=values.number("flow_sigmoid_scale", 1.0),
            beta_alpha=values.number("flow_beta_schedule_alpha", 2.0),
            beta_beta=values.number("flow_beta_schedule_beta", 2.0),
            shift=values.number("flow_schedule_shift", 3.0),
            auto_shift=auto,
        )

    def _listed_sigmas(self) -> FlowSchedule:
        self._idle(_DENSITY_KEYS, "has no effect with flow_custom_timesteps")
        given = self._values.json("flow_custom_timesteps")
        entries: list[Any] = (
            given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
        )
        try:
            numbers = [float(entry) for entry in entries if not isinstance(entry, bool)]
        except (TypeError, ValueError):
            numbers = []
        expected = "expected numbers: sigmas above 0 and at most 1, or timesteps above 1 and at most 1000"
        if not numbers or len(numbers) < len(entries) or not all(0 < number <= 1000 for number in numbers):
            self._problem("flow_custom_timesteps", f"is {given!r}; {expected}.")
            return FlowSchedule()
        if min(numbers) <= 1 < max(numbers):
            self._problem("flow_custom_timesteps", f"is {given!r}, which mixes both; {expected}.")
        sigmas = tuple(number if max(numbers) <= 1 else number / 1000 for number in numbers)
        in_turn = self._values.text("flow_timesteps_mode", "fixed-list") == "round-robin"
        return FlowSchedule(sigmas=sigmas, in_turn=in_turn)

    def train_fields(self) -> dict[str, Any]:
        """The train section's groups: bias, loss, noise, rollout and averaging."""
        return {
            "timestep_bias": self._bias(),
            "loss": self._loss(),
            "noise": self._noise(),
            "rollout": self._rollout(),
            "ema": self._ema(),
            **self._values.pick("nonfinite_loss"),
        }

    def _bias(self) -> TimestepBias:
        values = self._values
        strategy = values.text("timestep_bias_strategy", "none")
        used = {"none": (), "range": ("multiplier", "begin", "end")}.get(strategy, ("multiplier", "portion"))
        idle = [name for name in ("portion", "multiplier", "begin", "end") if name not in used]
        self._idle([f"timestep_bias_{name}" for name in idle], f"has no effect with timestep_bias_strategy {strategy}")
        bias = TimestepBias.model_validate(
            {"strategy": strategy}
            | {name: values.get(f"timestep_bias_{name}") for name in used if f"timestep_bias_{name}" in values}
        )
        if strategy != "none" and bias.multiplier == 1:
            self._problem("timestep_bias_multiplier", "is 1, which prefers no timestep; set it to another number.")
        if bias.begin >= bias.end:
            message = f"is {bias.begin}, not below timestep_bias_end {bias.end}."
            self._problem("timestep_bias_begin", message)
        return bias

    def _loss(self) -> LossSettings:
        values = self._values
        kind, gamma = values.text("loss_type", "l2"), values.number("snr_gamma", 0.0)
        if kind == "l2":
            self._idle(("huber_schedule", "huber_c"), "has no effect with loss_type l2")
        soft = 0.0
        if not values.flag("use_soft_min_snr"):
            self._idle(("soft_min_snr_sigma_data",), "needs use_soft_min_snr")
        elif gamma and "soft_min_snr_sigma_data" in values:
            message = "and snr_gamma both say where the weight bends (snr_gamma is 1 / sigma_data²); keep one of them."
            self._problem("soft_min_snr_sigma_data", message)
        elif gamma:
            soft, gamma = gamma**-0.5, 0.0
        elif "soft_min_snr_sigma_data" in values:
            soft = values.number("soft_min_snr_sigma_data", 1.0)
        else:
            self._problem("use_soft_min_snr", "is true; it needs soft_min_snr_sigma_data or snr_gamma.")
        if gamma or soft:
            self._idle(("snr_weight",), "has no effect with min-SNR weighting")
        diff2flow = self._diff2flow()
        if diff2flow:
            names = ("snr_gamma", "use_soft_min_snr", "snr_weight", "loss_type")
            self._idle(names, "has no effect with diff2flow_loss, which is the plain squared error of the flow")
        return LossSettings.model_validate(
            {
                "type": kind,
                "huber_schedule": values.text("huber_schedule", "snr"),
                "huber_c": values.number("huber_c", 0.1),
                "snr_gamma": gamma,
                "snr_weight": values.number("snr_weight", 1.0),
                "soft_sigma_data": soft,
                "diff2flow": diff2flow,
            }
        )

    def _diff2flow(self) -> bool:
        """Whether the loss is that of the flow; ``refuse_foreign`` answers for families that train one anyway."""
        enabled, loss = self._values.flag("diff2flow_enabled"), self._values.flag("diff2flow_loss")
        if self.flow:
            return False
        if enabled and not loss:
            self._problem("diff2flow_enabled", "changes nothing by itself; set diff2flow_loss too, or remove it.")
        if loss and not enabled:
            self._problem("diff2flow_loss", "needs diff2flow_enabled.")
        if loss and self._values.number("input_perturbation", 0.0):
            message = (
                "is not possible with diff2flow_loss: the flow is computed from the input, perturbation included, so "
                "that the model would be told to predict it too; remove one of them."
            )
            self._problem("input_perturbation", message)
        return enabled and loss

    def _noise(self) -> NoiseSettings:
        values = self._values
        offset = values.flag("offset_noise")
        perturbation = values.number("input_perturbation", 0.0)
        if not offset:
            if values.number("noise_offset", 0.0) > 0:
                self._idle(("noise_offset",), "needs offset_noise")
            self._idle(("noise_offset_probability",), "needs offset_noise")
        if not perturbation:
            self._idle(("input_perturbation_steps",), "needs input_perturbation")
        return NoiseSettings(
            offset=values.number("noise_offset", 0.1) if offset else 0.0,
            offset_probability=values.number("noise_offset_probability", 0.25) if offset else 1.0,
            perturbation=perturbation,
            perturbation_steps=values.integer("input_perturbation_steps", 0) if perturbation else 0,
        )

    def _rollout(self) -> RolloutSettings | None:
        values, prefix = self._values, "scheduled_sampling_"
        offset = values.integer(f"{prefix}max_step_offset", 0)
        if not offset:
            self._idle(_ROLLOUT_KEYS, f"needs {prefix}max_step_offset above 0")
            return None
        ramp = values.integer(f"{prefix}ramp_steps", 0)
        chance = values.number(f"{prefix}probability", 0.0)
        final = values.number(f"{prefix}prob_end", 0.5) if ramp else chance
        if ramp:
            reason = f"has no effect with {prefix}ramp_steps, which goes from prob_start to prob_end"
            self._idle((f"{prefix}probability",), reason)
            chance = values.number(f"{prefix}prob_start", 0.0)
        else:
            self._idle(_RAMP_KEYS, f"needs {prefix}ramp_steps")
        if not max(chance, final):
            chances = "prob_start and prob_end are" if ramp else "probability is"
            message = f"is {offset}, but {prefix}{chances} 0, so that no sample would be rolled out; raise it."
            self._problem(f"{prefix}max_step_offset", message)
        sampler, order = values.text(f"{prefix}sampler", "unipc"), values.integer(f"{prefix}order", 2)
        if sampler == "euler":
            self._idle((f"{prefix}order",), f"has no effect with {prefix}sampler euler")
            order = 1
        elif sampler == "dpm" and order > 2:
            self._problem(f"{prefix}order", f"is {order}; dpm has orders 1 and 2 (unipc has 3).")
        return RolloutSettings.model_validate(
            {
                "max_offset": offset,
                "strategy": values.text(f"{prefix}strategy", "uniform"),
                "probability": chance,
                "final_probability": final,
                "ramp_steps": ramp,
                "ramp_start": values.integer(f"{prefix}start_step", 0),
                "ramp_shape": values.text(f"{prefix}ramp_shape", "linear"),
                "sampler": sampler,
                "order": order,
                "reflex": self._reflex(),
            }
        )

    def _reflex(self) -> ReflexSettings | None:
        if not self.flow:
            return None
        if not self._values.flag("scheduled_sampling_reflexflow", True):
            self._idle(_REFLEX_KEYS, "needs scheduled_sampling_reflexflow")
            return None
        alpha, drift, loss = (
            self._values.number(name, default) for name, default in zip(_REFLEX_KEYS, (1.0, 10.0, 1.0), strict=True)
        )
        return ReflexSettings(alpha=alpha, drift_weight=drift, loss_weight=loss)

    def _ema(self) -> EmaSettings | None:
        values = self._values
        if not values.flag("use_ema"):
            names = ("ema_decay", "ema_update_interval", "ema_device", "ema_cpu_only", "ema_warmup_steps")
            self._idle(names, "needs use_ema")
            return None
        device = values.text("ema_device", "cpu")
        if device == "accelerator" and values.flag("ema_cpu_only"):
            self._problem("ema_cpu_only", "is true and ema_device is accelerator; keep one of them.")
        if values.text("ema_validation", "ema_only") != "ema_only":
            self._problem(
                "ema_validation",
                f"is {values.text('ema_validation')!r}, which is not available yet: the averages are what is exported, "
                "so pictures and losses are theirs; use 'ema_only'.",
            )
        return EmaSettings.model_validate(
            {
                "decay": values.number("ema_decay", 0.995),
                "update_interval": values.integer("ema_update_interval", 1),
                "warmup_steps": values.integer("ema_warmup_steps", 0),
                "device": device,
            }
        )

    def _idle(self, names: Sequence[str], reason: str) -> None:
        """Refuse keys that would be ignored, unless they are what SimpleTuner writes for "not chosen"."""
        for name in names:
            if name in self._values and self._values.get(name) != DEFAULTS.get(name):
                self._problem(name, f"{reason}; remove it.")

    def _problem(self, name: str, message: str) -> None:
        self._problems.append(Problem(f"{self._where}.{name}", message))
