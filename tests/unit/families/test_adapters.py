"""Every kind of adapter on every family: what is saved is what was trained, here and in stock diffusers or peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.objective import ProcessSettings
from kubetuner.config.sections.steps import ModelRef
from kubetuner.errors import ArtifactError, InputError
from kubetuner.families import Family, load_family

FAMILIES = ("pixart_sigma", "sdxl", "sana")
CPU = torch.device("cpu")
LORA = LoraSettings(rank=4, alpha=2.0, dropout=0.0)
KINDS = {
    "lora": LORA,
    "gaussian": LORA.model_copy(update={"init_type": "gaussian"}),
    "pissa": LORA.model_copy(update={"init_type": "pissa"}),
    "olora": LORA.model_copy(update={"init_type": "olora"}),
    "dora": LORA.model_copy(update={"use_dora": True}),
    "lokr": LoraSettings(algorithm="lokr", rank=10000, alpha=10000.0, dropout=0.0, factor=4),
    "lokr-low": LoraSettings(algorithm="lokr", rank=2, alpha=2.0, dropout=0.0, decompose_both=True, rank_dropout=0.1),
    "loha": LoraSettings(algorithm="loha", rank=4, alpha=2.0, dropout=0.0, module_dropout=0.1),
    "lokr-classes": LoraSettings(
        algorithm="lokr", rank=2, alpha=2.0, dropout=0.0, tucker=True, target_classes=("Attention",)
    ),
}
BLOCKS = {"pixart_sigma": "BasicTransformerBlock", "sdxl": "ResnetBlock2D", "sana": "GLUMBConv"}

kinds = pytest.mark.parametrize("kind", KINDS)
families = pytest.mark.parametrize("name", FAMILIES)


@families
@kinds
def test_what_is_saved_is_what_was_trained(
    name: str, kind: str, refs: dict[str, ModelRef], rows: list[LatentRow], tmp_path: Path
) -> None:
    family, ref = load_family(name), refs[name]
    tuned, plain, expected = _trained(family, ref, KINDS[kind], rows, torch.float32)
    effect = (expected - plain).abs().max()
    assert effect > 1e-3
    family.save_adapter(tmp_path / "a", tuned)
    family.save_adapter(tmp_path / "b", tuned)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert [(tmp_path / "a" / f).read_bytes() for f in files] == [(tmp_path / "b" / f).read_bytes() for f in files]
    ours = family.load_adapter(family.load_denoiser(ref, CPU, torch.float32), tmp_path / "a").eval()
    stock = _with_stock_loader(family, ref, tmp_path / "a").eval()
    for loaded in (ours, stock):
        torch.testing.assert_close(_predict(family, loaded, ref, rows), expected, rtol=0, atol=5e-6)


@families
@kinds
def test_the_same_on_a_bfloat16_base(
    name: str, kind: str, refs: dict[str, ModelRef], rows: list[LatentRow], tmp_path: Path
) -> None:
    family, ref = load_family(name), refs[name]
    if KINDS[kind].init_type in ("pissa", "olora"):
        with pytest.raises(InputError, match=r"would be rounded to torch\.bfloat16"):
            family.add_adapter(family.load_denoiser(ref, CPU, torch.bfloat16), KINDS[kind])
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tuned, plain, expected = _trained(family, ref, KINDS[kind], rows, torch.bfloat16)
        assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
        family.save_adapter(tmp_path, tuned)
        loaded = family.load_adapter(family.load_denoiser(ref, CPU, torch.bfloat16), tmp_path).eval()
        difference = (_predict(family, loaded, ref, rows) - expected).norm()
    assert difference < 0.05 * (expected - plain).norm() + 5e-3 * expected.norm()


@families
@kinds
def test_training_starts_at_the_base_and_can_start_at_an_adapter(
    name: str, kind: str, refs: dict[str, ModelRef], rows: list[LatentRow], tmp_path: Path
) -> None:
    family, ref = load_family(name), refs[name]
    base = _predict(family, family.load_denoiser(ref, CPU, torch.float32), ref, rows)
    fresh = family.add_adapter(family.load_denoiser(ref, CPU, torch.float32), KINDS[kind]).eval()
    torch.testing.assert_close(_predict(family, fresh, ref, rows), base, rtol=0, atol=2e-5)
    if KINDS[kind].init_type in ("pissa", "olora"):
        return
    tuned, _, expected = _trained(family, ref, KINDS[kind], rows, torch.float32)
    family.save_adapter(tmp_path, tuned)
    settings = KINDS[kind].model_copy(update={"init_lora": str(tmp_path)})
    started = family.add_adapter(family.load_denoiser(ref, CPU, torch.float32), settings)
    assert {n for n, p in started.named_parameters() if p.requires_grad} == {
        n for n, p in tuned.named_parameters() if p.requires_grad
    }
    assert torch.equal(_predict(family, started.eval(), ref, rows), expected)
    half = settings.model_copy(update={"rank": 1, "alpha": 1.0})
    with pytest.raises(InputError, match=r"init_lora: .* is another adapter .*r (4|2|10000) \(asked for: 1\)"):
        family.add_adapter(family.load_denoiser(ref, CPU, torch.float32), half)


@families
def test_a_start_of_another_kind_or_base_is_refused(name: str, refs: dict[str, ModelRef], tmp_path: Path) -> None:
    family, ref = load_family(name), refs[name]
    tuned = family.add_adapter(family.load_denoiser(ref, CPU, torch.float32), LORA)
    family.save_adapter(tmp_path, tuned)
    start = {"init_lora": str(tmp_path)}
    for settings, error, message in (
        (KINDS["dora"], InputError, r"use_dora False \(asked for: True\)"),
        (KINDS["loha"], InputError, r"peft_type LORA \(asked for: LOHA\)"),
        (LORA.model_copy(update={"target_modules": ("to_q",)}), ArtifactError, "does not fit this base"),
    ):
        with pytest.raises(error, match=message):
            family.add_adapter(family.load_denoiser(ref, CPU, torch.float32), settings.model_copy(update=start))
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"not tensors")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        family.add_adapter(
            family.load_denoiser(ref, CPU, torch.float32), LORA.model_copy(update={"init_lora": str(other)})
        )


@pytest.mark.parametrize("alpha", [4.0, 2.0])
def test_a_start_without_metadata_has_the_alpha_of_its_rank(
    alpha: float, refs: dict[str, ModelRef], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    family, ref = load_family("sdxl"), refs["sdxl"]
    family.save_adapter(tmp_path, family.add_adapter(family.load_denoiser(ref, CPU, torch.float32), LORA))
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / "pytorch_lora_weights.safetensors"), bare)
    settings = LoraSettings(rank=4, alpha=alpha, init_lora=str(bare))
    if alpha == 4.0:
        family.add_adapter(family.load_denoiser(ref, CPU, torch.float32), settings)
        return
    with pytest.raises(InputError, match=r"lora_alpha 4 \(asked for: 2\)"):
        family.add_adapter(family.load_denoiser(ref, CPU, torch.float32), settings)


@families
def test_classes_hold_the_layers(name: str, refs: dict[str, ModelRef], rows: list[LatentRow], tmp_path: Path) -> None:
    """Convolutions among them: SDXL's are 3x3, Sana's partly grouped."""
    family, ref = load_family(name), refs[name]
    settings = KINDS["lokr-classes"].model_copy(update={"target_classes": (BLOCKS[name],)})
    tuned, _, expected = _trained(family, ref, settings, rows, torch.float32)
    owners = {n.split(".lokr_")[0] for n, p in tuned.named_parameters() if p.requires_grad}
    blocks = [n for n, m in tuned.named_modules() if type(m).__name__ == BLOCKS[name]]
    layers = {n for n, m in family.load_denoiser(ref, CPU, torch.float32).named_modules()
              if isinstance(m, nn.Linear | nn.Conv2d) and any(n.startswith(f"{b}.") for b in blocks)}  # fmt: skip
    assert owners == layers
    family.save_adapter(tmp_path, tuned)
    stock = _with_stock_loader(family, ref, tmp_path).eval()
    torch.testing.assert_close(_predict(family, stock, ref, rows), expected, rtol=0, atol=1e-5)
    wrong = settings.model_copy(update={"target_classes": ("Attention", "FedForward")})
    with pytest.raises(InputError, match=r"names FedForward, .* It has: .*Attention"):
        family.add_adapter(family.load_denoiser(ref, CPU, torch.float32), wrong)


def test_layers_that_cannot_have_the_adapter(refs: dict[str, ModelRef]) -> None:
    for name, settings, message in (
        ("sana", {"target_modules": ("conv_depth",), "rank": 3}, "convolution in .* groups"),
        ("sdxl", {"target_modules": ("conv1",), "init_type": "pissa"}, "conv1 is a convolution"),
        ("pixart_sigma", {"rank": 64, "init_type": "olora"}, "cannot find 64 directions"),
    ):
        family = load_family(name)
        with pytest.raises(InputError, match=message):
            family.add_adapter(family.load_denoiser(refs[name], CPU, torch.float32), LORA.model_copy(update=settings))


def _trained(
    family: Family, ref: ModelRef, settings: LoraSettings, rows: list[LatentRow], dtype: torch.dtype
) -> tuple[nn.Module, Tensor, Tensor]:
    """A denoiser with an adapter moved away from its start, the base's prediction and its own."""
    denoiser = family.load_denoiser(ref, CPU, dtype)
    plain = _predict(family, denoiser, ref, rows)
    torch.manual_seed(0)
    tuned = family.add_adapter(denoiser, settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in tuned.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return tuned, plain, _predict(family, tuned, ref, rows)


@torch.no_grad()
def _predict(family: Family, denoiser: nn.Module, ref: ModelRef, rows: list[LatentRow]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"embeds": (5, 16)}
    if family.facts.name == "sdxl":
        shapes = {"embeds": (77, 32), "pooled": (16,)}
    text = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    process = family.noise_process(ref, ProcessSettings())
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    sample = process.add_noise(latents, torch.ones_like(latents), process.eval_levels(2))
    conditioning = family.collate([text, None], text, rows[:2])
    return family.predict(denoiser, sample.noisy_latents, sample.timesteps, conditioning).float()


def _with_stock_loader(family: Family, ref: ModelRef, folder: Path) -> nn.Module:
    """What the model card tells a stranger to do."""
    pipeline: Any = DiffusionPipeline.from_pretrained(ref.path)
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(getattr(pipeline, family.facts.denoiser), str(folder))
        merged: nn.Module = adapted.merge_and_unload()
        return merged
    pipeline.load_lora_weights(str(folder))
    denoiser: nn.Module = getattr(pipeline, family.facts.denoiser)
    return denoiser
