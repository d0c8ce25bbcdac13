"""What holds for every family, on pipelines of random weights in stock diffusers folders."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.objective import ProcessSettings
from kubetuner.config.sections.steps import CacheTextSection, EvaluateSection, ModelRef
from kubetuner.errors import ArtifactError, InputError
from kubetuner.families import Family, load_family

FAMILIES = ("pixart_sigma", "sdxl", "sana")
TEXTS = ["a red circle on a white background", "a star", "a blue square and a green triangle on a black background"]
# numpy 2 warns about diffusers' way of turning PIL pictures into arrays.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.parametrize("name", FAMILIES),
]


def _section(ref: ModelRef, **settings: Any) -> CacheTextSection:
    return CacheTextSection(model=ref, **settings)


def _evaluate(ref: ModelRef, **settings: Any) -> EvaluateSection:
    return EvaluateSection(
        model=ref, model_type="full", guidance=3.0, num_inference_steps=2, **{"mixed_precision": "no"} | settings
    )


def _inputs(family: Family, ref: ModelRef, rows: list[LatentRow]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    cpu = torch.device("cpu")
    *texts, null = family.encode_texts(family.load_text_encoders(ref, cpu), [*TEXTS, ""], _section(ref))
    shape = family.latent_shape(family.load_vae(ref, cpu), 64, 32)
    latents = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    process = family.noise_process(ref, ProcessSettings())
    sample = process.add_noise(latents, torch.ones_like(latents), process.eval_levels(3))
    return sample.noisy_latents, sample.timesteps, family.collate([*texts[:2], None], null, rows)


@pytest.mark.parametrize("batch", [1, 16])
def test_texts_are_the_stock_pipelines(name: str, batch: int, refs: dict[str, ModelRef], cpu: torch.device) -> None:
    family, ref = load_family(name), refs[name]
    stock = DiffusionPipeline.from_pretrained(ref.path)
    section = _section(ref, text_encoder_batch_size=batch)
    ours = family.encode_texts(family.load_text_encoders(ref, cpu), TEXTS, section)
    with torch.no_grad():
        encoded = stock.encode_prompt(TEXTS, do_classifier_free_guidance=False, device=cpu)
    for row, named in enumerate(ours):
        assert tuple(named) == family.facts.text_tensors
        assert all(tensor.dtype == torch.float32 for tensor in named.values())
        if name == "sdxl":
            torch.testing.assert_close(named["embeds"], encoded[0][row], rtol=0, atol=1e-5)
            torch.testing.assert_close(named["pooled"], encoded[2][row], rtol=0, atol=1e-5)
            continue
        kept = encoded[0][row][encoded[1][row].bool()]
        torch.testing.assert_close(named["embeds"], kept, rtol=0, atol=1e-5)
    if name != "sdxl":
        blocks = {each.data_ptr(): each.nbytes() for each in (named["embeds"].untyped_storage() for named in ours)}
        assert sum(blocks.values()) == sum(named["embeds"].nbytes for named in ours)  # No padding is kept.


def test_texts_are_made_as_they_are_stored(name: str, refs: dict[str, ModelRef], cpu: torch.device) -> None:
    family, ref = load_family(name), refs[name]
    encoders = family.load_text_encoders(ref, cpu)
    whole, rounded = (
        family.encode_texts(encoders, [*TEXTS, ""], _section(ref, text_encoder_batch_size=2, dtype=dtype))
        for dtype in ("fp32", "bf16")
    )
    for one, other in zip(whole, rounded, strict=True):
        assert {key: tensor.dtype for key, tensor in other.items()} == dict.fromkeys(one, torch.bfloat16)
        assert all(torch.equal(one[key].bfloat16(), tensor) for key, tensor in other.items())
        assert all(tensor.is_contiguous() for tensor in (*one.values(), *other.values()))


def test_latents(name: str, refs: dict[str, ModelRef], cpu: torch.device) -> None:
    family, ref = load_family(name), refs[name]
    vae = family.load_vae(ref, cpu)
    pixels = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shape = family.latent_shape(vae, 64, 32)
    latents = family.encode_pixels(vae, pixels, None)
    assert latents.shape == (2, *shape)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    sampled = family.encode_pixels(vae, pixels, noise)
    encoded = vae.encode(pixels)
    scale = vae.config.scaling_factor
    if name == "sana":
        assert torch.equal(latents, encoded.latent * scale)
        assert torch.equal(sampled, latents)
    else:
        posterior = encoded.latent_dist
        torch.testing.assert_close(latents, posterior.mean * scale)
        torch.testing.assert_close(sampled, (posterior.mean + posterior.std * noise) * scale)


def test_halves_load_as_float32(name: str, refs: dict[str, ModelRef], cpu: torch.device) -> None:
    family, ref = load_family(name), refs[name]
    pipeline = family.load_pipeline(ref, None, cpu)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            assert {tensor.dtype for tensor in part.parameters()} == {torch.float32}
    assert {p.dtype for p in family.load_denoiser(ref, cpu, torch.bfloat16).parameters()} == {torch.bfloat16}
    assert type(pipeline).__name__ == family.facts.pipeline


def test_conditioning_is_moved_and_predicted(name: str, refs: dict[str, ModelRef], rows: list[LatentRow]) -> None:
    family, ref = load_family(name), refs[name]
    noisy, timesteps, conditioning = _inputs(family, ref, rows)
    denoiser = family.load_denoiser(ref, torch.device("cpu"), torch.float32)
    prediction = family.predict(denoiser, noisy, timesteps, conditioning)
    assert prediction.shape == noisy.shape
    assert all(len(tensor) == 3 for tensor in conditioning.values())
    assert all(tensor.dtype == torch.float32 for tensor in conditioning.values())
    prediction.square().mean().backward()


def test_caption_of_one_sample_does_not_touch_another(
    name: str, refs: dict[str, ModelRef], rows: list[LatentRow], cpu: torch.device
) -> None:
    family, ref = load_family(name), refs[name]
    denoiser = family.load_denoiser(ref, cpu, torch.float32)
    long = " ".join(TEXTS * 2)
    short, longer, null = family.encode_texts(family.load_text_encoders(ref, cpu), ["a star", long, ""], _section(ref))
    noisy = torch.randn(2, *family.latent_shape(family.load_vae(ref, cpu), 64, 32))
    times = torch.tensor([500, 500])
    together = family.predict(denoiser, noisy, times, family.collate([short, longer], null, rows[:2]))
    alone = family.predict(denoiser, noisy[:1], times[:1], family.collate([short], null, rows[:1]))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("alpha", [4.0, 1.5])
def test_adapter_round_trip_is_exact(
    name: str, alpha: float, refs: dict[str, ModelRef], rows: list[LatentRow], tmp_path: Path, cpu: torch.device
) -> None:
    family, ref = load_family(name), refs[name]
    inputs = _inputs(family, ref, rows)
    base = family.load_denoiser(ref, cpu, torch.float32)
    with torch.no_grad():
        plain = family.predict(base, *inputs)
    settings = LoraSettings(rank=4, alpha=alpha, dropout=0.3)
    tuned = family.add_adapter(family.load_denoiser(ref, cpu, torch.float32), settings).eval()
    trainable = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in n for n in trainable)
    with torch.no_grad():
        torch.testing.assert_close(family.predict(tuned, *inputs), plain, rtol=0, atol=1e-6)
        for parameter in trainable.values():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        expected = family.predict(tuned, *inputs)
    assert not torch.allclose(expected, plain, atol=1e-3)
    family.save_adapter(tmp_path / "a", tuned)
    family.save_adapter(tmp_path / "b", tuned)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert [(tmp_path / "a" / f).read_bytes() for f in files] == [(tmp_path / "b" / f).read_bytes() for f in files]
    loaded = family.load_adapter(base, tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.equal(family.predict(loaded, *inputs), expected)
        stock = _with_stock_loader(name, family, ref, tmp_path / "a").eval()
        assert torch.equal(family.predict(stock, *inputs), expected)


def _with_stock_loader(name: str, family: Family, ref: ModelRef, folder: Path) -> torch.nn.Module:
    if name == "pixart_sigma":
        from peft import PeftModel

        base = family.load_denoiser(ref, torch.device("cpu"), torch.float32)
        model: torch.nn.Module = PeftModel.from_pretrained(base, str(folder)).base_model.model
        return model
    pipeline = DiffusionPipeline.from_pretrained(ref.path)
    pipeline.load_lora_weights(str(folder))
    denoiser: torch.nn.Module = getattr(pipeline, family.facts.denoiser)
    return denoiser


def test_adapters_are_float32_on_a_bfloat16_base(name: str, refs: dict[str, ModelRef], cpu: torch.device) -> None:
    family = load_family(name)
    tuned = family.add_adapter(family.load_denoiser(refs[name], cpu, torch.bfloat16), LoraSettings(rank=2))
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}


def test_bfloat16_autocast_trains(name: str, refs: dict[str, ModelRef], rows: list[LatentRow]) -> None:
    family, ref = load_family(name), refs[name]
    noisy, timesteps, conditioning = _inputs(family, ref, rows)
    base = family.load_denoiser(ref, torch.device("cpu"), torch.bfloat16)
    tuned = family.add_adapter(base, LoraSettings(rank=2, dropout=0.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = family.predict(tuned, noisy, timesteps, conditioning)
    prediction.float().square().mean().backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


def test_wrong_target_modules_say_what_exists(name: str, refs: dict[str, ModelRef], cpu: torch.device) -> None:
    family = load_family(name)
    denoiser = family.load_denoiser(refs[name], cpu, torch.float32)
    with pytest.raises(InputError, match=r"got to_w, which names no .*It has: .*to_k, .*to_out\.0"):
        family.add_adapter(denoiser, LoraSettings(target_modules=("to_q", "to_w")))


def test_adapter_of_another_base_is_refused(
    name: str, refs: dict[str, ModelRef], cpu: torch.device, tmp_path: Path
) -> None:
    family = load_family(name)
    tuned = family.add_adapter(family.load_denoiser(refs[name], cpu, torch.float32), LoraSettings(rank=2))
    family.save_adapter(tmp_path, tuned)
    from safetensors.torch import load_file, save_file

    path = next(tmp_path.glob("*.safetensors"))
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path, metadata=metadata)
    with pytest.raises(ArtifactError, match="does not fit this base"):
        family.load_adapter(family.load_denoiser(refs[name], cpu, torch.float32), tmp_path)
    path.unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        family.load_adapter(family.load_denoiser(refs[name], cpu, torch.float32), tmp_path)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_draws_what_the_denoiser_and_seed_say(
    name: str, precision: str, refs: dict[str, ModelRef], cpu: torch.device
) -> None:
    family, ref = load_family(name), refs[name]
    section = _evaluate(ref, mixed_precision=precision, negative_prompt="blurry")
    denoiser = family.load_denoiser(ref, cpu, torch.float32)
    pipeline = family.load_pipeline(ref, denoiser, cpu)
    assert getattr(pipeline, family.facts.denoiser) is denoiser
    first, again, other = (family.draw(pipeline, "a star", (64, 32), seed, section) for seed in (1, 1, 2))
    assert first.size == (64, 32)
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert not np.array_equal(np.asarray(first), np.asarray(other))


def test_draws_the_stock_picture(name: str, refs: dict[str, ModelRef], cpu: torch.device) -> None:
    family, ref = load_family(name), refs[name]
    ours = family.draw(family.load_pipeline(ref, None, cpu), "a star", (32, 32), 5, _evaluate(ref, clean_caption=False))
    stock = DiffusionPipeline.from_pretrained(ref.path)
    stock.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {
        "pixart_sigma": {"use_resolution_binning": False, "clean_caption": False},
        "sdxl": {},
    }.get(name, {"use_resolution_binning": False, "complex_human_instruction": None})
    generator = torch.Generator().manual_seed(5)
    theirs = stock(
        "a star", width=32, height=32, guidance_scale=3.0, num_inference_steps=2, generator=generator, **options
    ).images[0]
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_saved_pipeline_is_a_base_again(
    name: str, refs: dict[str, ModelRef], rows: list[LatentRow], tmp_path: Path, cpu: torch.device
) -> None:
    family, ref = load_family(name), refs[name]
    inputs = _inputs(family, ref, rows)
    denoiser = family.load_denoiser(ref, cpu, torch.float32)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.1)
        expected = family.predict(denoiser, *inputs)
        family.load_pipeline(ref, denoiser, cpu).save_pretrained(tmp_path)
        again = family.load_denoiser(ref.model_copy(update={"path": str(tmp_path)}), cpu, torch.float32)
        assert torch.equal(family.predict(again, *inputs), expected)


def test_another_vae_is_used_from_either_layout(
    name: str, refs: dict[str, ModelRef], tmp_path: Path, cpu: torch.device
) -> None:
    family, ref = load_family(name), refs[name]
    other = family.load_vae(ref, cpu)
    with torch.no_grad():
        next(other.parameters()).fill_(0.5)
    other.save_pretrained(tmp_path / "alone")
    other.save_pretrained(tmp_path / "pipeline" / "vae")
    for folder in ("alone", "pipeline"):
        chosen = ref.model_copy(update={"vae_path": str(tmp_path / folder)})
        for vae in (family.load_vae(chosen, cpu), family.load_pipeline(chosen, None, cpu).vae):
            assert bool((next(vae.parameters()) == 0.5).all())


def test_only_needed_subfolders_are_read(
    name: str, refs: dict[str, ModelRef], tmp_path: Path, cpu: torch.device
) -> None:
    family, ref = load_family(name), refs[name]
    for part in (family.facts.denoiser, "scheduler"):
        shutil.copytree(Path(ref.path) / part, tmp_path / part)
    alone = ref.model_copy(update={"path": str(tmp_path)})
    family.load_denoiser(alone, cpu, torch.float32)
    family.noise_process(alone, ProcessSettings())
    with pytest.raises(InputError, match="cannot load vae of"):
        family.load_vae(alone, cpu)
    with pytest.raises(InputError, match="cannot load tokenizer of"):
        family.load_text_encoders(alone, cpu)
    with pytest.raises(InputError, match="variant fp16"):
        family.load_denoiser(alone.model_copy(update={"variant": "fp16"}), cpu, torch.float32)
    with pytest.raises(InputError, match="Check pretrained_model_name_or_path"):
        family.load_pipeline(alone, None, cpu)
