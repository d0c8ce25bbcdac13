import json
import shutil
from pathlib import Path

import pytest
import torch

from kubetuner.config.sections.objective import FlowSchedule, ProcessSettings, SchedulerChange
from kubetuner.config.sections.steps import ModelRef
from kubetuner.errors import InputError
from kubetuner.families import load_family

ZERO = SchedulerChange(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


# diffusers 0.42 hands a tensor to numpy.array.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("family", ["sdxl", "pixart_sigma"])
def test_zero_terminal_snr_in_training_and_in_the_saved_pipeline(
    refs: dict[str, ModelRef], tmp_path: Path, family: str
) -> None:
    ref = refs[family].model_copy(update={"scheduler": ZERO})
    made = load_family(ref.family)

    process = made.noise_process(ref, ProcessSettings())
    latents, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    last = process.add_noise(latents, noise, torch.tensor([999]))
    assert torch.equal(last.noisy_latents, noise)
    assert torch.equal(last.target, -latents)

    pipeline = made.load_pipeline(ref, None, torch.device("cpu"))
    pipeline.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert saved.items() >= ZERO.settings().items()
    pipeline.scheduler.set_timesteps(4)
    assert int(pipeline.scheduler.timesteps[0]) == 999


def test_predicting_noise_from_pure_noise_is_refused(refs: dict[str, ModelRef]) -> None:
    ref = refs["sdxl"].model_copy(update={"scheduler": SchedulerChange(rescale_betas_zero_snr=True)})
    with pytest.raises(InputError, match="Set prediction_type to v_prediction"):
        load_family("sdxl").noise_process(ref, ProcessSettings())


def test_a_sampler_that_cannot_is_refused(refs: dict[str, ModelRef], tmp_path: Path) -> None:
    shutil.copytree(refs["sdxl"].path, tmp_path / "base")
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    ref = ModelRef(family="sdxl", path=str(tmp_path / "base"), scheduler=ZERO)
    with pytest.raises(InputError, match="PNDMScheduler has no rescale_betas_zero_snr"):
        load_family("sdxl").load_pipeline(ref, None, torch.device("cpu"))


def test_an_auto_shift_reads_the_base(refs: dict[str, ModelRef], tmp_path: Path) -> None:
    shutil.copytree(refs["sana"].path, tmp_path / "base")
    path = tmp_path / "base/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_shift": 2.0, "base_image_seq_len": 64}))
    ref = ModelRef(family="sana", path=str(tmp_path / "base"))
    settings = ProcessSettings(flow=FlowSchedule(auto_shift=True))

    process = load_family("sana").noise_process(ref, settings)

    assert (process.auto.max_mu, process.auto.base_tokens, process.auto.max_tokens) == (2.0, 64, 4096)
    patch = json.loads((tmp_path / "base/transformer/config.json").read_text())["patch_size"]
    assert process.auto.patch == patch
