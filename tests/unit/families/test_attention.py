import pytest
import torch
from torch import Tensor, nn

from kubetuner.artifacts import LatentRow
from kubetuner.config.sections.steps import ModelRef
from kubetuner.errors import InputError
from kubetuner.families import load_family
from kubetuner.families.attention import DispatchProcessor, use_attention

CPU = torch.device("cpu")
TEXT = {"pixart_sigma": {"embeds": (5, 16)}, "sana": {"embeds": (5, 16)}, "sdxl": {"embeds": (77, 32), "pooled": (16,)}}
families = pytest.mark.parametrize("name", TEXT)


@families
@pytest.mark.parametrize("mechanism", ["native-math", "native-flash"])
def test_another_kernel_gives_the_same_prediction_and_gradient(
    name: str, mechanism: str, refs: dict[str, ModelRef], rows: list[LatentRow]
) -> None:
    denoiser = load_family(name).load_denoiser(refs[name], CPU, torch.float32)
    before = _run(name, denoiser, rows)
    assert use_attention(denoiser, mechanism, CPU) > 0
    torch.testing.assert_close(_run(name, denoiser, rows), before, rtol=0, atol=1e-5)


@families
def test_every_softmax_attention_is_replaced(name: str, refs: dict[str, ModelRef], rows: list[LatentRow]) -> None:
    """Sana's linear self-attention is left as it is; a replaced processor is really asked."""
    denoiser = load_family(name).load_denoiser(refs[name], CPU, torch.float32)
    assert use_attention(denoiser, "diffusers", CPU) == 0
    use_attention(denoiser, "native-math", CPU)
    kinds = {type(module.processor) for module in denoiser.modules() if hasattr(module, "processor")}
    others = {kind.__name__ for kind in kinds - {DispatchProcessor}}
    assert others == ({"SanaLinearAttnProcessor2_0"} if name == "sana" else set())
    for module in denoiser.modules():
        if isinstance(getattr(module, "processor", None), DispatchProcessor):
            module.processor = DispatchProcessor("no such kernel", "no such kernel", True)
    with pytest.raises(ValueError, match="no such kernel"):
        _run(name, denoiser, rows)


def test_norms_of_queries_and_keys_are_applied() -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0

    states, mask = torch.randn(2, 6, 16), torch.zeros(2, 1, 6)
    mask[0, 0, 4:] = -10000.0
    for processor, norm in ((AttnProcessor2_0(), "layer_norm"), (SanaAttnProcessor2_0(), "rms_norm_across_heads")):
        layer = Attention(query_dim=16, heads=2, dim_head=8, kv_heads=2, qk_norm=norm, processor=processor)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        expected = layer(states, attention_mask=mask)
        assert use_attention(layer, "native-math", CPU) == 1
        torch.testing.assert_close(layer(states, attention_mask=mask), expected, rtol=1e-5, atol=1e-4)


def test_what_is_missing_is_said(refs: dict[str, ModelRef]) -> None:
    denoiser = load_family("sdxl").load_denoiser(refs["sdxl"], CPU, torch.float32)
    with pytest.raises(InputError, match="needs the Python package flash_attn, which is not installed"):
        use_attention(denoiser, "flash-attn-2", CPU)
    with pytest.raises(InputError, match="native-cudnn runs on an NVIDIA GPU only"):
        use_attention(denoiser, "native-cudnn", CPU)


def _run(name: str, denoiser: nn.Module, rows: list[LatentRow]) -> Tensor:
    """Prediction and, behind it, the gradient of the input."""
    generator = torch.Generator().manual_seed(1)
    long = {key: torch.randn(shape, generator=generator) for key, shape in TEXT[name].items()}
    short = long if name == "sdxl" else {"embeds": long["embeds"][:3]}
    family = load_family(name)  # type: ignore[arg-type]
    conditioning = family.collate([long, short], long, rows[:2])
    noisy = torch.randn(2, 4, 8, 8, generator=generator, requires_grad=True)
    prediction = family.predict(denoiser, noisy, torch.tensor([10, 900]), conditioning)
    prediction.square().sum().backward()
    assert noisy.grad is not None
    return torch.cat([prediction.detach().flatten(), noisy.grad.flatten()])
