"""Our forward passes, losses and updates against what SimpleTuner and diffusers' scripts recorded on tiny models.

``data/`` holds three consecutive float32 CPU steps of each run: inputs, loss, gradient norms, and weights after.
We differ on purpose in what lies outside these files: SimpleTuner halves Sana's latents and ignores its flow shift
(``ref_sana_full`` is therefore diffusers' transformer on a recorded batch), and forces PixArt's clipping to 0.01, which
here is a setting that the replay applies.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.objective import LossSettings, ProcessSettings, SchedulerChange
from kubetuner.config.sections.steps import ModelRef
from kubetuner.families import load_family

DATA = Path(__file__).parent / "data"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    file: str
    family: str
    model: str
    clip: float
    lora: bool = False

    def __str__(self) -> str:
        return self.file


RUNS = [
    Run("st_sdxl_lora", "sdxl", "sdxl", 1.0, lora=True),
    Run("diffusers_sdxl_lora", "sdxl", "sdxl", 1.0, lora=True),
    Run("diffusers_sdxl_full", "sdxl", "sdxl", 1.0),
    Run("st_pixart_full", "pixart_sigma", "pixart", 0.01),
    Run("ref_sana_full", "sana", "sana", 1.0),
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_replay(run: Run) -> None:
    recorded = load_file(DATA / f"{run.file}.safetensors")
    with safe_open(DATA / f"{run.file}.safetensors", framework="pt") as file:
        names = json.loads(file.metadata()["param_names"])
    ref = ModelRef(family=run.family, path=str(DATA / "models" / run.model))
    family = load_family(ref.family)
    process = family.noise_process(ref, ProcessSettings())
    denoiser = family.load_denoiser(ref, CPU, torch.float32)
    if run.lora:
        denoiser = family.add_adapter(denoiser, LoraSettings(rank=4, alpha=4, dropout=0.0))
        _set(denoiser, recorded, "init.")
    trained = dict(denoiser.named_parameters())
    assert {name for name, parameter in trained.items() if parameter.requires_grad} == set(names)
    parameters = [trained[name] for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, eps=1e-8)
    for step in ("step1.", "step2.", "step3."):
        batch = {name.removeprefix(step): value for name, value in recorded.items() if name.startswith(step)}
        levels = batch["sigmas"].flatten() if "sigmas" in batch else batch["timesteps"]
        sample = process.add_noise(batch["latents"], batch["noise"], levels)
        torch.testing.assert_close(sample.noisy_latents, batch["noisy_latents"], rtol=0, atol=1e-6)
        prediction = family.predict(denoiser, sample.noisy_latents, sample.timesteps, _conditioning(batch))
        loss = process.loss(prediction, sample).mean()
        assert abs(loss.item() - batch["loss"].item()) <= 1e-6
        loss.backward()
        norms = torch.stack([parameter.grad.norm() for parameter in parameters if parameter.grad is not None])
        torch.testing.assert_close(norms, batch["grad_norm_per_param"], rtol=1e-3, atol=1e-6)
        nn.utils.clip_grad_norm_(parameters, run.clip)
        optimizer.step()
        optimizer.zero_grad()
        after = torch.stack([parameter.detach().double().norm() for parameter in parameters])
        torch.testing.assert_close(after, batch["param_norm_after"], rtol=0, atol=1e-4)
    for name, value in recorded.items():
        if name.startswith("after3."):
            torch.testing.assert_close(trained[name.removeprefix("after3.")].detach(), value, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("prediction", "name", "settings"),
    [
        ("epsilon", "l2", LossSettings()),
        ("epsilon", "snr5", LossSettings(snr_gamma=5.0)),
        ("epsilon", "huber_const", LossSettings(type="huber", huber_schedule="constant")),
        ("epsilon", "smooth_l1_const", LossSettings(type="smooth_l1", huber_schedule="constant")),
        ("epsilon", "huber_snr", LossSettings(type="huber", huber_schedule="snr")),
        ("epsilon", "huber_exponential", LossSettings(type="huber", huber_schedule="exponential")),
        ("epsilon", "huber_snr_gamma5", LossSettings(type="huber", huber_schedule="constant", snr_gamma=5.0)),
        ("v_prediction", "vpred_l2", LossSettings()),
        ("v_prediction", "vpred_snr5", LossSettings(snr_gamma=5.0)),
    ],
)
def test_losses_are_simpletuners(prediction: str, name: str, settings: LossSettings) -> None:
    recorded = load_file(DATA / "st_loss_variants.safetensors")
    ref = ModelRef(family="sdxl", path=str(DATA / "models/sdxl"), scheduler=SchedulerChange(prediction_type=prediction))
    process = load_family("sdxl").noise_process(ref, ProcessSettings(loss=settings))
    sample = process.add_noise(recorded["latents"], recorded["noise"], recorded["timesteps"])
    target = recorded["noise" if prediction == "epsilon" else "target.v"]
    torch.testing.assert_close(sample.target, target, rtol=0, atol=1e-6)
    ours = process.loss(recorded["model_pred"], sample).mean()
    assert abs(ours.item() - recorded[f"loss.{name}"].item()) <= 1e-6


def _set(denoiser: nn.Module, recorded: dict[str, Tensor], prefix: str) -> None:
    weights = {name.removeprefix(prefix): value for name, value in recorded.items() if name.startswith(prefix)}
    assert weights
    assert not denoiser.load_state_dict(weights, strict=False).unexpected_keys


def _conditioning(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("encoder_hidden_states", "encoder_attention_mask", "added_cond.text_embeds", "added_cond.time_ids")
    named = {name.removeprefix("added_cond."): batch[name] for name in names if name in batch}
    if "time_ids" in named:
        named["time_ids"] = named["time_ids"].reshape(-1, 6)
    return named
