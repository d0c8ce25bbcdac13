"""The least that PyTorch can cost for a training step.

Forward, loss, backward, clipping and AdamW on one batch that is already noised, and nothing else:
``python stopwatch.py TIMES.json bench.peers.floor FOLDER STEPS`` in a folder where :class:`bench.peers.workload.Ours`
has cached.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from kubetuner.config.sections.steps import TrainSection
from kubetuner.data.batches import Batches
from kubetuner.families import load_family
from kubetuner.training.denoiser import prepare_denoiser
from kubetuner.training.objective import Objective
from kubetuner.training.optimizers import make_optimizer


def main(folder: Path, steps: int) -> None:
    """Take ``steps`` steps."""
    sections = json.loads((folder / "plan/sections.json").read_text(encoding="utf-8"))
    section = TrainSection.model_validate_json(json.dumps(sections["train"]))
    family, cpu = load_family(section.model.family), torch.device("cpu")
    batches = Batches(section, [folder / "cache_vae"], [folder / "cache_text_embeds"], family.facts.text_tensors)
    process = family.noise_process(section.model, section.process())
    objective = Objective(family, process, batches.null, section.seed, section.mixed_precision == "bf16")
    question = objective.question(batches.batch(0, 0), 0, 0)
    denoiser = prepare_denoiser(section, family, cpu).train()
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(section, parameters)
    for _ in range(steps):
        loss = nn.functional.mse_loss(objective.answer(denoiser, question), question.noisy.target)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
