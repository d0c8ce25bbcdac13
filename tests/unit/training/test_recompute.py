from pathlib import Path

import pytest
import torch

from kubetuner.training.loop import Job
from kubetuner.training.recompute import recompute_activations
from tests.unit.training.conftest import RandomBatches, Setup


@pytest.mark.parametrize("family", ["pixart_sigma", "sdxl", "sana"])
def test_recomputing_fewer_blocks_keeps_more_and_changes_nothing(setup: Setup, tmp_path: Path, family: str) -> None:
    kept, gradients = [], []
    for interval in (1, 2, 1000):
        job = setup.job(
            family, RandomBatches(family), model_type="full", lora=None, gradient_checkpointing=False,
            mixed_precision="no",
        )  # fmt: skip
        denoiser = job.denoiser.train().requires_grad_(True)
        recompute_activations(denoiser, interval)
        for step in range(2):  # The second time every block is known.
            denoiser.zero_grad()
            count = _saved_bytes(job, step)
        kept.append(count)
        gradients.append(torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None]))
    assert kept[0] < kept[1] <= kept[2]
    assert all(torch.allclose(gradients[0], other, rtol=0, atol=1e-6) for other in gradients[1:])


@pytest.mark.parametrize("family", ["pixart_sigma", "sdxl", "sana"])
def test_the_settings_decide_what_is_kept(setup: Setup, family: str) -> None:
    kept = []
    for settings in ({"gradient_checkpointing": False}, {"gradient_checkpointing_interval": 2}, {}):
        job = setup.job(family, RandomBatches(family), model_type="full", lora=None, mixed_precision="no", **settings)
        job.denoiser.train()
        kept.append([_saved_bytes(job, step) for step in range(2)][-1])
    assert kept[0] > kept[1] > kept[2]


def _saved_bytes(job: Job, step: int) -> int:
    """Take a step's gradient; returns the bytes that autograd kept of the forward pass."""
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = job.objective.losses(job.denoiser, job.question(step, 0)).mean()
    loss.backward()
    return total
