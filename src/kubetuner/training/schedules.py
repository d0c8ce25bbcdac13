"""Learning rates as a plain function of the step, with the meanings that diffusers and transformers use."""

import math

from kubetuner.config.sections.steps import TrainSection


def learning_rate(section: TrainSection, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (0 is the first) of ``total_steps``.

    All but ``constant`` rise linearly from 0 over ``lr_warmup_steps`` to where they start. Then
    ``constant_with_warmup`` stays, ``linear`` and ``cosine`` fall to 0, ``cosine_with_restarts`` does so
    ``lr_num_cycles`` times, ``polynomial`` falls to ``lr_end`` as ``(1 - progress) ** lr_power``, and ``sine`` swings
    ``lr_num_cycles`` times between ``learning_rate`` and ``lr_end``, from the middle upwards. SimpleTuner
    takes the length of a cosine's or sine's wave from ``lr_warmup_steps``; here it is the rest of the run.
    """
    if section.lr_scheduler == "constant":
        return section.learning_rate
    warmup = section.lr_warmup_steps
    if step < warmup:
        return _after_warmup(section, 0.0) * step / warmup
    return _after_warmup(section, min(1.0, (step - warmup) / max(1, total_steps - warmup)))


def _after_warmup(section: TrainSection, progress: float) -> float:
    """The rate at ``progress`` in 0..1 from the end of the warmup to the end of the run."""
    top, cycles = section.learning_rate, section.lr_num_cycles
    match section.lr_scheduler:
        case "constant" | "constant_with_warmup":
            return top
        case "linear":
            return top * (1.0 - progress)
        case "cosine":
            return top * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "cosine_with_restarts":
            return 0.0 if progress >= 1 else top * 0.5 * (1.0 + math.cos(math.pi * (progress * cycles % 1.0)))
        case "polynomial":
            return section.lr_end + (top - section.lr_end) * math.pow(1.0 - progress, section.lr_power)
        case "sine":
            wave = 0.5 * (1.0 + math.sin(2.0 * math.pi * progress * cycles))
            return section.lr_end + (top - section.lr_end) * wave
