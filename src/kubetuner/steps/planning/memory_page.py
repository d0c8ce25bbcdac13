"""The plan page's section about GPU memory."""

import json

from kubetuner.steps.planning.memory import CARD, GIB, USABLE, Forecast, Option, smallest_card

_NOTHING = (
    "Nothing tried here fits. What is left: smaller pictures (`resolution`), `model_type` lora instead of full, a "
    "smaller model, or a larger GPU."
)


def memory_section(found: Forecast) -> str:
    """What was predicted, or why nothing was; whether it fits; settings that take less where it does not."""
    return f"## GPU memory\n\n{_prediction(found)}"


def _prediction(found: Forecast) -> str:
    memory = found.memory
    if memory is None:
        return f"Not predicted: {found.reason}"
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "averages": memory.averages,
        "activations and casts": memory.activations,
        "the VAE's weights": memory.encoding.weights,
        "the VAE's activations": memory.encoding.activations,
    }
    named = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size > 0)
    peak = f"Predicted peak: **{_gib(memory.peak)}** for a batch of {found.batch} ({named})."
    if memory.loading + GIB // 10 > memory.peak:
        peak += " Its fullest moment is that of loading, before the base's weights are rounded."
    rule = f"{USABLE:.0%} of its memory counted as usable"
    if found.card:
        verdict = "It fits" if found.fits(memory.peak) else "It **does not fit**"
        return f"{peak} {verdict} the GPU of {_gib(found.card)}, {rule}.{_options(found)}"
    size = smallest_card(memory.peak)
    verdict = f"It fits a GPU of {size} GiB, {rule}." if size else "It fits no usual GPU."
    return f"{peak} {verdict} Set `{CARD}` to the memory of yours; where it is too little, settings that fit are shown."


def _options(found: Forecast) -> str:
    if found.memory is not None and found.fits(found.memory.peak):
        return ""
    enough = any(found.fits(option.peak) for option in found.options)
    advice = [] if enough else [_NOTHING]
    if found.own_sizes:
        advice.append(f"Smaller batches take less; those of {', '.join(found.own_sizes)} are set in the data file.")
    if not found.options:
        return f" {' '.join(advice)}"
    rows = "".join(_row(option, found) for option in found.options)
    heading = "Settings that take less; none of them was made:\n\n| change | predicted peak | fits |\n|---|---|---|"
    return f"\n\n{heading}\n{rows}" + (f"\n{' '.join(advice)}" if advice else "")


def _row(option: Option, found: Forecast) -> str:
    change = json.dumps(dict(option.change))[1:-1]
    return f"| `{change}` | {_gib(option.peak)} | {'yes' if found.fits(option.peak) else 'no'} |\n"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
