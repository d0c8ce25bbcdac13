"""torch.compile: the same training but for rounding, as few graphs as there are shapes, and nothing left behind."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from kubetuner.config.compilation import CompileSettings, missing_compiler
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.objective import EmaSettings, RolloutSettings
from kubetuner.errors import InputError
from kubetuner.families.text import PAD_TO_COMPILED
from kubetuner.training.checkpoints import Checkpoints
from kubetuner.training.compilation import Graphs, compiled, require_compiler
from kubetuner.training.interruption import TerminatedError
from kubetuner.training.loop import Job, train_denoiser
from kubetuner.training.saving import save_adapter, save_pipeline
from tests.unit.training.conftest import CPU, RandomBatch, RandomBatches, Setup
from tests.unit.training.test_loop import terminate_at
from tests.unit.training.test_regularisation import spoil

FAMILIES = ("pixart_sigma", "sdxl", "sana")
LORA = LoraSettings(rank=2, alpha=4.0, dropout=0.0)
AOT = CompileSettings(backend="aot_eager")
EAGER = CompileSettings(backend="eager")
INDUCTOR = CompileSettings(backend="inductor")

# Torch's own, while it traces and when it first imports inductor.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("model_type", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_weights_are_those_of_the_uncompiled_run(
    setup: Setup, tmp_path: Path, family: str, model_type: str
) -> None:
    settings = {"model_type": model_type, "lora": LORA if model_type == "lora" else None, "mixed_precision": "no"}
    settings |= {"max_train_steps": 3, "ema": EmaSettings(), "gradient_accumulation_steps": 2}
    plain = setup.job(family, RandomBatches(family), **settings)
    expected, _ = train(plain, tmp_path / "plain")
    job = setup.job(family, RandomBatches(family), compilation=AOT, **settings)
    names, modules = job.denoiser.state_dict().keys(), list(job.denoiser.modules())

    losses, graphs = train(job, tmp_path / "compiled")

    assert losses == pytest.approx(expected, rel=1e-5)
    for name, weight in plain.trained().items():
        torch.testing.assert_close(job.trained()[name], weight, rtol=0, atol=2e-4)  # Of steps of 1e-2.
    assert graphs.shapes == 1
    assert 1 <= graphs.made <= 2
    assert graphs.unexpected == 0
    assert job.denoiser.state_dict().keys() == names
    assert list(job.denoiser.modules()) == modules
    assert not any("forward" in vars(module) for module in modules)


def test_a_graph_per_shape_and_none_more(setup: Setup, tmp_path: Path) -> None:
    """Latents of two sizes and captions of 5 and 70 tokens, the latter padded to 64 and 128."""
    batches = Shapes("sana", [(8, 8, 5), (8, 16, 5), (8, 8, 70), (8, 8, 20)])
    job = setup.job("sana", batches, max_train_steps=8, lora=LORA, compilation=EAGER)
    job = replace(job, objective=replace(job.objective, pad_text_to=PAD_TO_COMPILED))

    _, graphs = train(job, tmp_path)

    assert (graphs.shapes, graphs.made, graphs.unexpected) == (3, 6, 0)
    assert str(graphs) == "compiled 6 graphs for 3 shapes of batches"


def test_switching_the_adapter_off_is_part_of_the_count(setup: Setup, tmp_path: Path) -> None:
    """Regularisation batches run the base model too, in eval mode."""
    settings = {"lora": LORA, "mixed_precision": "no", "max_train_steps": 3}
    jobs = [setup.job("sana", RandomBatches("sana"), **settings, compilation=value) for value in (None, EAGER)]
    plain, job = (replace(job, objective=replace(job.objective, regularising=frozenset({"a"}))) for job in jobs)
    spoil(plain)
    spoil(job)
    expected, _ = train(plain, tmp_path / "plain")

    losses, graphs = train(job, tmp_path / "compiled")

    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[3] > 1e-6
    assert graphs.unexpected == 0
    assert graphs.made == 4


@pytest.mark.parametrize("family", ["pixart_sigma", "sana"])
def test_rollouts_need_no_more_shapes(setup: Setup, tmp_path: Path, family: str) -> None:
    """Samples that a rollout leaves behind would otherwise make batches of their own sizes."""
    sometimes = RolloutSettings(max_offset=3, probability=0.7, final_probability=0.7)
    settings = {"model_type": "full", "lora": None, "mixed_precision": "no", "max_train_steps": 6}
    settings |= {"rollout": sometimes, "learning_rate": 1e-4}
    expected, _ = train(setup.job(family, RandomBatches(family), **settings), tmp_path / "plain")
    job = setup.job(family, RandomBatches(family), compilation=EAGER, **settings)
    moving = [job.question(step, 0).departure for step in range(6)]
    assert {len(one.moving(0)) for one in moving if one is not None} == {1, 2}

    losses, graphs = train(job, tmp_path / "compiled")

    assert losses == pytest.approx(expected, rel=1e-4)
    assert graphs.shapes == 2  # With a rollout and without.
    assert (graphs.made, graphs.unexpected) == (4, 0)  # First block and others, with gradients and without.


def test_an_unexpected_graph_is_reported_with_torchs_reason(
    setup: Setup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def freeze(step: int) -> None:
        if step == 4:
            job.denoiser.transformer_blocks[1].attn1.eval()

    job = setup.job("sana", RandomBatches("sana", act=freeze), compilation=EAGER)
    with caplog.at_level(logging.WARNING, "kubetuner"):
        _, graphs = train(job, tmp_path)

    assert graphs.unexpected == 1
    assert "1 more graph(s) for a batch of shapes that were compiled before" in caplog.text
    assert "training" in caplog.text
    assert str(graphs).endswith("1 of them unexpectedly")


def test_the_whole_network_can_be_compiled(setup: Setup, tmp_path: Path) -> None:
    settings = {"model_type": "full", "lora": None, "mixed_precision": "no", "max_train_steps": 4}
    expected, _ = train(setup.job("sana", RandomBatches("sana"), **settings), tmp_path / "plain")
    whole = CompileSettings(backend="aot_eager", regional=False)

    losses, graphs = train(setup.job("sana", RandomBatches("sana"), compilation=whole, **settings), tmp_path / "whole")

    assert losses == pytest.approx(expected, rel=1e-5)
    assert graphs.made <= 2
    assert graphs.unexpected == 0


def test_a_compiled_run_resumes_bit_for_bit(setup: Setup, tmp_path: Path) -> None:
    settings = {"compilation": AOT, "checkpoint_step_interval": 3}
    whole = setup.job("sana", RandomBatches("sana"), **settings)
    expected, _ = train(whole, tmp_path / "whole")
    with pytest.raises(TerminatedError):
        train(setup.job("sana", RandomBatches("sana", act=terminate_at(3)), **settings), tmp_path / "parts")
    torch._dynamo.reset()
    resumed = setup.job("sana", RandomBatches("sana"), **settings)

    losses, _ = train(resumed, tmp_path / "parts")

    assert losses == {step: expected[step] for step in (5, 6)}
    assert all(torch.equal(weight, resumed.trained()[name]) for name, weight in whole.trained().items())


@pytest.mark.parametrize("model_type", ["full", "lora"])
def test_what_was_trained_compiled_is_saved_as_ever(setup: Setup, tmp_path: Path, model_type: str) -> None:
    lora = LORA if model_type == "lora" else None
    job = setup.job("sana", RandomBatches("sana"), model_type=model_type, lora=lora, compilation=EAGER)
    _, graphs = train(job, tmp_path)
    made = graphs.made

    if lora is None:
        assert (save_pipeline(job, tmp_path) / "model_index.json").is_file()
    else:
        save_adapter(job, tmp_path / "adapter")
    assert graphs.made == made


def test_a_failure_leaves_the_denoiser_uncompiled(setup: Setup) -> None:
    job = setup.job("sana", RandomBatches("sana"))

    def fail() -> None:
        with compiled(job.denoiser, AOT, ("SanaTransformerBlock",)):
            assert sum("forward" in vars(module) for module in job.denoiser.modules()) == 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any("forward" in vars(module) for module in job.denoiser.modules())


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    require_compiler(AOT, CPU)
    with pytest.raises(InputError, match=r"needs a C[+][+] compiler, and no-such-compiler is not installed"):
        require_compiler(INDUCTOR, CPU)


@pytest.mark.skipif(bool(missing_compiler(INDUCTOR)), reason="no C++ compiler")
def test_inductors_kernels_train_alike(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    settings = {"model_type": "full", "lora": None, "mixed_precision": "no", "max_train_steps": 2}
    settings["gradient_checkpointing"] = False
    expected, _ = train(setup.job("sdxl", RandomBatches("sdxl"), **settings), tmp_path / "plain")

    losses, graphs = train(setup.job("sdxl", RandomBatches("sdxl"), compilation=INDUCTOR, **settings), tmp_path / "new")

    assert losses == pytest.approx(expected, rel=1e-4)
    assert (graphs.made, graphs.unexpected) == (1, 0)
    assert any((tmp_path / "kernels").rglob("*.so"))


class Shapes(RandomBatches):
    """Batches of the given (height, width, tokens) in turn."""

    def __init__(self, family: str, shapes: list[tuple[int, int, int]]) -> None:
        super().__init__(family)
        self.shapes = shapes

    def batch(self, step: int, micro: int) -> RandomBatch:
        batch = super().batch(step, micro)
        height, width, tokens = self.shapes[step % len(self.shapes)]
        return RandomBatch(batch.rows, torch.randn(2, 4, height, width), [{"embeds": torch.randn(tokens, 16)}] * 2)


def train(job: Job, folder: Path) -> tuple[dict[int, float], Graphs]:
    losses: dict[int, float] = {}

    def log(values: Mapping[str, float], step: int) -> None:
        losses[step] = values["train_loss"]

    outcome = train_denoiser(job, Checkpoints(folder, "key", 5), log)
    assert (outcome.graphs is None) == (job.section.compilation is None)
    return losses, outcome.graphs or Graphs()
