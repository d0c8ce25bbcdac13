"""Learning rates as a plain function of the step, with the meanings that diffusers and transformers use."""

import math

from kubetuner.config.sections import TrainSection


def learning_rate(section: TrainSection, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (0 is the first) of ``total_steps``.

    All but ``constant`` rise linearly from 0 over ``lr_warmup_steps``. Then ``constant_with_warmup`` stays, ``linear``
    and ``cosine`` fall to 0, and ``polynomial`` falls to ``lr_end`` as ``(1 - progress) ** lr_power``.
    """
    top = section.learning_rate
    if section.lr_scheduler == "constant":
        return top
    warmup = section.lr_warmup_steps
    if step < warmup:
        return top * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match section.lr_scheduler:
        case "constant_with_warmup":
            return top
        case "linear":
            return top * (1.0 - progress)
        case "cosine":
            return top * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "polynomial":
            return section.lr_end + (top - section.lr_end) * math.pow(1.0 - progress, section.lr_power)
