"""The predicted peak against what the CPU's allocator really does, for the same step with real numbers."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.objective import EmaSettings
from kubetuner.config.sections.steps import DatasetSampling, ModelRef, TrainSection
from kubetuner.errors import InputError
from kubetuner.families import load_family
from kubetuner.families.architectures import outline_autoencoder
from kubetuner.families.encoding import load_encoder
from kubetuner.training.denoiser import prepare_denoiser
from kubetuner.training.memory.encoding import Encoding, predict_encoding
from kubetuner.training.memory.gpu_rules import GpuRules
from kubetuner.training.memory.prediction import Memory, Predictor, Shapes
from tests.unit.rounding import PRECISIONS, quantised, quiet
from tests.unit.training.conftest import Setup

FAMILIES = ("pixart_sigma", "sdxl", "sana")
FULL = {"model_type": "full"}
LORA = {"model_type": "lora", "lora": LoraSettings(rank=2, alpha=2.0, dropout=0.1)}
BIASES = {**FULL, "layer_freeze_strategy": "bitfit"}
SHAPES = Shapes((4, 32, 32), 40)
WORKSPACE = 32 * 2**20


def section(setup: Setup, family: str, **settings: object) -> TrainSection:
    base = {
        "model": {"family": family, "path": str(setup.bases / family)},
        "datasets": (DatasetSampling(id="a"),),
        "max_train_steps": 1,
        "train_batch_size": 2,
        "gradient_checkpointing": False,
        **FULL,
    }
    return TrainSection.model_validate(base | settings)


def predict(setup: Setup, family: str, **settings: object) -> Memory:
    return Predictor(SHAPES).predict(section(setup, family, **settings))


def without_optimizer(memory: Memory) -> int:
    return memory.peak - memory.optimizer - WORKSPACE


def run_backwards(denoiser: nn.Module, one: TrainSection, *, as_on_gpu: bool) -> None:
    family, batch = load_family(one.model.family), one.train_batch_size
    shapes = family.conditioning_shapes(denoiser, SHAPES.tokens)
    text = {name: torch.ones(batch, *shape) for name, shape in shapes.items()}
    noisy, target = torch.randn(2, batch, *SHAPES.latents)
    bf16 = one.mixed_precision == "bf16"
    plain = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with GpuRules(bf16=bf16) if as_on_gpu else plain:
        prediction = family.predict(denoiser, noisy, torch.full((batch,), 500.0), text)
    (prediction.float() - target).square().mean().backward()


def real_peak(one: TrainSection, *, as_on_gpu: bool) -> int:
    """By the allocator's own events, from the network's weights on."""
    denoiser = prepare_denoiser(one, load_family(one.model.family), torch.device("cpu")).train()
    weights = sum(tensor.nbytes for tensor in [*denoiser.parameters(), *denoiser.buffers()])
    run_backwards(denoiser, one, as_on_gpu=as_on_gpu)  # The first time makes tables that stay.
    denoiser.zero_grad()
    return weights + peak_of(lambda: run_backwards(denoiser, one, as_on_gpu=as_on_gpu))


def peak_of(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


@pytest.mark.parametrize("kind", [FULL, LORA, BIASES], ids=["full", "lora", "bitfit"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_is_what_the_allocator_sees(
    setup: Setup, family: str, mixed_precision: str, kind: dict[str, object]
) -> None:
    settings = {"mixed_precision": mixed_precision, **kind}
    found = without_optimizer(predict(setup, family, **settings))
    assert found == pytest.approx(real_peak(section(setup, family, **settings), as_on_gpu=True), rel=0.03)


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_so_it_is_with_the_kernels_of_a_cpu(
    setup: Setup, family: str, checkpointing: bool, kind: dict[str, object]
) -> None:
    settings = {"mixed_precision": "no", "gradient_checkpointing": checkpointing, **kind}
    found = without_optimizer(predict(setup, family, **settings))
    assert found == pytest.approx(real_peak(section(setup, family, **settings), as_on_gpu=False), rel=0.15)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_is_what_the_allocator_sees(setup: Setup, family: str, moments: bool) -> None:
    model = ModelRef.model_validate({"family": family, "path": str(setup.bases / family)})
    encoder = load_encoder(model, "fp32", 3)
    pixels = [torch.zeros(3, 256, 320, dtype=torch.uint8)] * 3
    encoder.encode("abc", pixels, moments=moments)
    peak = peak_of(lambda: encoder.encode("abc", pixels, moments=moments))

    found = predict_encoding(model, 3, (320, 256), moments=moments)

    assert found.activations == pytest.approx(peak, rel=0.1)
    tensors = [*encoder.vae.parameters(), *encoder.vae.buffers()]
    assert found.weights == sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)
    alone, both = (Predictor(SHAPES, encoding).predict(section(setup, family)) for encoding in (Encoding(), found))
    assert both.peak - alone.peak == found.weights + found.activations


@pytest.mark.parametrize("path", ["stabilityai/stable-diffusion-xl-base-1.0", "terminusresearch/sana-1.6b-1024px"])
def test_autoencoders_of_published_checkpoints_need_no_download(path: str) -> None:
    family, million = ("sana", 312) if "sana" in path else ("sdxl", 84)
    vae = outline_autoencoder(ModelRef.model_validate({"family": family, "path": path}))
    assert sum(parameter.numel() for parameter in vae.parameters()) == pytest.approx(million * 1e6, rel=0.01)
    small, large = (
        predict_encoding(ModelRef.model_validate({"family": family, "path": path}), count, (1024, 1024), moments=True)
        for count in (1, 4)
    )
    assert small.weights == large.weights
    assert small.activations < large.activations


@pytest.mark.parametrize("kind", [FULL, LORA, BIASES], ids=["full", "lora", "bitfit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_gradients_and_states_are_exact(setup: Setup, family: str, kind: dict[str, object]) -> None:
    one = section(setup, family, optimizer="optimi-lion", ema=EmaSettings(device="accelerator"), **kind)
    real = prepare_denoiser(one, load_family(one.model.family), torch.device("cpu"))
    tensors = [*real.parameters(), *real.buffers()]
    trained = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    memory = Predictor(SHAPES).predict(one)
    assert memory.weights == sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)
    assert (memory.gradients, memory.optimizer, memory.averages) == (4 * trained,) * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_takes_less_and_what_takes_more(setup: Setup, family: str) -> None:
    def peak(**settings: object) -> int:
        return predict(setup, family, **settings).peak

    plain = peak()
    every, second = (
        peak(gradient_checkpointing=True),
        peak(gradient_checkpointing=True, gradient_checkpointing_interval=2),
    )
    assert every <= second <= plain
    assert every < plain
    assert peak(train_batch_size=1) < plain < peak(train_batch_size=3)
    assert peak(attention_mechanism="native-math") > plain
    assert peak(mixed_precision="no") > plain
    assert peak(**LORA, gradient_accumulation_steps=2) >= peak(**LORA)
    adapters = ({"algorithm": "lokr"}, {"algorithm": "loha"}, {"use_dora": True}, {"init_type": "pissa"})
    for adapter in adapters:
        more = {"target_classes": ("Attention",)} if "algorithm" in adapter else {}
        lora = LoraSettings.model_validate({"rank": 2, "alpha": 2.0, "dropout": 0.0, **more, **adapter})
        assert peak(model_type="lora", lora=lora) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_bases(setup: Setup, family: str) -> None:
    whole = predict(setup, family, **LORA)
    sizes = {
        precision: predict(setup, family, **LORA, base_model_precision=precision)
        for precision in ("int8-torchao", "int8-quanto", "nf4-bnb")
    }
    assert sizes["nf4-bnb"].weights < sizes["int8-quanto"].weights < whole.weights
    assert all(memory.loading <= whole.weights for memory in sizes.values())


@quantised
@quiet
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rounded_base_keeps_what_its_library_keeps(setup: Setup, family: str, precision: str) -> None:
    settings = {**LORA, "base_model_precision": precision}
    found = without_optimizer(predict(setup, family, **settings))
    assert found == pytest.approx(real_peak(section(setup, family, **settings), as_on_gpu=True), rel=0.05)


def test_what_was_traced_serves_other_optimizers(setup: Setup) -> None:
    predictor = Predictor(SHAPES)
    one = section(setup, "sana")
    first = predictor.predict(one)
    other = predictor.predict(one.model_copy(update={"optimizer": "bnb-lion8bit"}))
    assert first.peak - other.peak == first.optimizer - other.optimizer
    assert other.optimizer == int(first.gradients / 4 * 1.1)


def test_a_model_without_a_configuration_is_named(setup: Setup, tmp_path) -> None:
    (tmp_path / "transformer").mkdir()
    ref = {"family": "sana", "path": str(tmp_path)}
    with pytest.raises(InputError, match=r"transformer/config\.json of .* cannot be read"):
        predict(setup, "sana", model=ref)
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "AutoConfig"}')
    with pytest.raises(InputError, match="_class_name is 'AutoConfig'"):
        predict(setup, "sana", model=ref)
    (tmp_path / "transformer" / "config.json").write_text(
        '{"_class_name": "SanaTransformer2DModel", "num_layers": "x"}'
    )
    with pytest.raises(InputError, match="makes no SanaTransformer2DModel"):
        predict(setup, "sana", model=ref)
