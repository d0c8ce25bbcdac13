"""Groups of settings of the training objective, inside the train section: noise, noise levels, loss, averaging.

Names are SimpleTuner's keys; what each family can use is decided in :mod:`kubetuner.config.build_objective`.
"""

from typing import Literal

from kubetuner.config.sections.base import Section

Prediction = Literal["epsilon", "v_prediction"]
Spacing = Literal["leading", "linspace", "trailing"]


class SchedulerChange(Section):
    """How a base is read otherwise than its scheduler's configuration says; it is saved with the trained model.

    Attributes:
        prediction_type: ``prediction_type``; empty for the base's own.
        rescale_betas_zero_snr: Whether the last timestep is pure noise; ``None`` for the base's own setting.
        timestep_spacing: ``inference_scheduler_timestep_spacing``; empty for the base's own.
    """

    prediction_type: Literal["", "epsilon", "v_prediction"] = ""
    rescale_betas_zero_snr: bool | None = None
    timestep_spacing: Literal["", "leading", "linspace", "trailing"] = ""

    def settings(self) -> dict[str, object]:
        """What to change, under the names of a diffusers scheduler's configuration."""
        return {name: value for name, value in self.model_dump().items() if value not in ("", None)}


class FlowSchedule(Section):
    """Densities of a flow-matching family (``flow_*``).

    The defaults are those Sana was trained with by its authors: ``weighting_scheme: logit_normal`` with mean 0 and
    deviation 1 and ``flow_shift: 3.0`` in every ``configs/sana_config`` of NVlabs/Sana. SimpleTuner draws Sana's sigmas
    evenly over the repository's table, whatever these keys say.

    Attributes:
        density: ``logit_normal`` is SimpleTuner's sigmoid density, ``uniform`` is ``flow_use_uniform_schedule``,
            ``beta`` is ``flow_use_beta_schedule``.
        sigmoid_scale: ``flow_sigmoid_scale``.
        beta_alpha: ``flow_beta_schedule_alpha`` above 0.
        beta_beta: ``flow_beta_schedule_beta`` above 0.
        shift: ``flow_schedule_shift``: sigma' = shift * sigma / (1 + (shift - 1) * sigma); 1 and 0 leave it as it is.
        auto_shift: ``flow_schedule_auto_shift``: the shift follows the number of image tokens, in place of ``shift``.
        sigmas: ``flow_custom_timesteps`` as sigmas above 0 and at most 1, drawn from in place of a density, and not
            shifted; empty for none.
        in_turn: ``flow_timesteps_mode`` ``round-robin``: samples take them one after the other, and not by chance.
    """

    density: Literal["logit_normal", "uniform", "beta"] = "logit_normal"
    sigmoid_scale: float = 1.0
    beta_alpha: float = 2.0
    beta_beta: float = 2.0
    shift: float = 3.0
    auto_shift: bool = False
    sigmas: tuple[float, ...] = ()
    in_turn: bool = False


class TimestepBias(Section):
    """Timesteps drawn ``multiplier`` times as often as the others (``timestep_bias_*``).

    Attributes:
        strategy: ``earlier`` are the ``portion`` with least noise, ``later`` with most, ``range`` is begin..end.
        portion: Share in 0..1.
        multiplier: Above 0.
        begin: First timestep of ``range``.
        end: The timestep after its last.
    """

    strategy: Literal["none", "earlier", "later", "range"] = "none"
    portion: float = 0.25
    multiplier: float = 1.0
    begin: int = 0
    end: int = 1000


class LossSettings(Section):
    """How a prediction is scored.

    Attributes:
        type: ``loss_type``.
        huber_schedule: How ``huber_c`` depends on the noise level.
        huber_c: Where the Huber losses turn from square to linear; above 0.
        snr_gamma: min-SNR weighting (Hang et al. 2023); 0 for none.
        snr_weight: Factor of an unweighted loss.
        soft_sigma_data: ``soft_min_snr_sigma_data`` with ``use_soft_min_snr``: soft min-SNR (Crowson et al. 2024); its
            gamma is ``1 / soft_sigma_data ** 2``; 0 for none.
        diff2flow: ``diff2flow_loss``: a diffusion model's prediction is scored as the flow noise - latents that it
            stands for (Schusterbauer et al. 2025, https://arxiv.org/abs/2506.02221).
    """

    type: Literal["l2", "huber", "smooth_l1"] = "l2"
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    huber_c: float = 0.1
    snr_gamma: float = 0.0
    snr_weight: float = 1.0
    soft_sigma_data: float = 0.0
    diff2flow: bool = False


class ProcessSettings(Section):
    """What a family's noise process is made with, besides the base's own schedule.

    Attributes:
        segmented: Spread a batch's timesteps over the range (not ``disable_segmented_timestep_sampling``).
        offset: A dataset's ``timestep_sampling_offset``; 0 for a family that trains no flow.
    """

    segmented: bool = True
    offset: float = 0.0
    flow: FlowSchedule = FlowSchedule()
    bias: TimestepBias = TimestepBias()
    loss: LossSettings = LossSettings()


class NoiseSettings(Section):
    """Changes to the training noise.

    Attributes:
        offset: ``noise_offset`` with ``offset_noise``: deviation of a shift that is the same for a whole channel.
        offset_probability: ``noise_offset_probability``: share of batches that get it.
        perturbation: ``input_perturbation``: deviation of further noise that only the input gets, not the target.
        perturbation_steps: ``input_perturbation_steps``: it falls to 0 over so many steps; 0 keeps it.
    """

    offset: float = 0.0
    offset_probability: float = 1.0
    perturbation: float = 0.0
    perturbation_steps: int = 0


class ReflexSettings(Section):
    """What is added to the loss of a flow's rolled-out samples (``scheduled_sampling_reflexflow*``).

    Attributes:
        alpha: How much more an element counts where the rollout changed the prediction.
        drift_weight: ``beta1``: weight of the direction back to the picture.
        loss_weight: ``beta2``: weight of the loss proper.
    """

    alpha: float = 1.0
    drift_weight: float = 10.0
    loss_weight: float = 1.0


class RolloutSettings(Section):
    """Samples whose noisy input the model draws itself, from more noise (``scheduled_sampling_*``).

    Attributes:
        max_offset: ``max_step_offset``: timesteps that a rollout takes at most, of 1..999.
        strategy: ``uniform`` draws all lengths 0..max_offset evenly, ``biased_early`` more short ones, ``biased_late``
            more long ones.
        probability: Share of samples before and without a ramp: ``probability``, or ``prob_start`` with a ramp.
        final_probability: ``prob_end``, reached after the ramp; ``probability`` again without one.
        ramp_steps: Optimizer steps from one to the other.
        ramp_start: ``start_step``: the optimizer step at which the ramp begins.
        ramp_shape: Straight, or half a cosine wave.
        sampler: What solves the way down.
        order: Its order; 1 for ``euler``.
        reflex: ``None`` for a diffusion model, and for a flow without ``reflexflow``.
    """

    max_offset: int
    strategy: Literal["uniform", "biased_early", "biased_late"] = "uniform"
    probability: float = 0.0
    final_probability: float = 0.0
    ramp_steps: int = 0
    ramp_start: int = 0
    ramp_shape: Literal["linear", "cosine"] = "linear"
    sampler: Literal["unipc", "euler", "dpm"] = "unipc"
    order: int = 2
    reflex: ReflexSettings | None = None


class EmaSettings(Section):
    """Averaging of the trained weights (``ema_*``); the averages are what is exported and evaluated.

    Attributes:
        decay: ``ema_decay``, the most of the old average that an update keeps; 0..1.
        update_interval: Optimizer steps between updates.
        warmup_steps: Before this step the average is a copy, from then on the decay is ``decay``; 0 lets it rise
            as (1 + s) / (10 + s) instead.
        device: Where the averages are kept: ``accelerator`` saves the copy to the CPU at each update.
    """

    decay: float = 0.995
    update_interval: int = 1
    warmup_steps: int = 0
    device: Literal["cpu", "accelerator"] = "cpu"
