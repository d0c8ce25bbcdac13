"""The plan as a Markdown page."""

from collections.abc import Sequence

from kubetuner.config.load import RunConfig
from kubetuner.config.schedule import stages, weights
from kubetuner.config.sections.steps import Sections, TrainSection
from kubetuner.errors import on_one_line
from kubetuner.steps.planning.costs import Costs
from kubetuner.steps.planning.datasets import Measured, batches_per_epoch, drawn_per_epoch, kept_buckets
from kubetuner.steps.planning.memory import Forecast
from kubetuner.steps.planning.memory_page import memory_section

_NAMED = 10


def page(
    run: RunConfig,
    sections: Sections,
    measured: Sequence[Measured],
    epoch: int,
    costs: Costs,
    raised: Sequence[str] = (),
    found: Forecast | None = None,
) -> str:
    """The whole page: ``raised`` is what the plan changed or found, ``found`` the predicted GPU memory."""
    blocks = [
        "# Plan",
        _model(sections, epoch, costs, predicted=found is not None and found.memory is not None),
        "" if found is None else memory_section(found),
        _datasets(sections, measured),
        "\n".join(f"- {remark}" for remark in raised),
        _turns(sections, measured),
        _buckets(sections, measured),
        _skipped(measured),
        _evaluation(sections),
        _notes(run),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def amount(count: int) -> str:
    """Bytes for a person."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _model(sections: Sections, epoch: int, costs: Costs, *, predicted: bool) -> str:
    train = sections.train
    steps = train.max_train_steps or train.num_train_epochs * epoch
    pictures = [size * train.planned_micro_steps for size in train.batch_sizes]
    each = " to ".join(str(count) for count in dict.fromkeys((pictures[0], pictures[-1])))
    kind = _kind(train)
    rows = [
        ("model", f"`{train.model.path}` ({train.model.family})"),
        ("revision", f"`{train.model.revision[:12] or 'newest'}`"),
        ("training", f"{kind}, {costs.parameters / 1e6:.1f} million weights in the denoiser"),
        ("processes", _processes(train)),
        ("steps", f"{steps} of {each} pictures; {epoch} per epoch, {steps / epoch:.1f} epochs"),
        ("learning rate", f"{train.learning_rate:g}, {train.lr_scheduler}, {train.lr_warmup_steps} warm-up steps"),
        ("latents", amount(costs.latents_bytes)),
        ("text embeddings", f"at most {amount(costs.text_embeds_bytes)}, with one caption per picture"),
    ]
    if not predicted:
        rows.append(("memory", f"{amount(costs.training_memory_bytes)} for weights and optimizer{_each(train)}"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows)


def _kind(train: TrainSection) -> str:
    if train.lora is None:
        return "biases only (BitFit)" if train.layer_freeze_strategy == "bitfit" else "full fine-tune"
    return f"{train.lora.title} " + ("of full rank" if train.lora.full_rank else f"of rank {train.lora.rank}")


def _each(train: TrainSection) -> str:
    each = "; of each GPU" if train.planned_processes > 1 else ""
    return f"{each}; activations come on top"


def _processes(train: TrainSection) -> str:
    sharing = ", which share the weights out (FSDP2)" if train.fsdp else ""
    there = f" on each of {train.num_machines} machines" if train.num_machines > 1 else ""
    if train.num_train_processes:
        return f"{train.num_train_processes}{there}{sharing}"
    counted = "for one on each" if there else "for one"
    return f"one per GPU that training finds{there}{sharing}; steps and pictures below are {counted}"


def _datasets(sections: Sections, measured: Sequence[Measured]) -> str:
    lines = ["## Datasets", "", "| id | role | pictures | skipped | buckets | repeats | per epoch | batch | captions |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for one in measured:
        drawn = drawn_per_epoch(one, sections.train) if one.trained_on else 0
        cells = (
            one.id,
            _role(one),
            one.samples,
            len(one.skipped),
            len(one.buckets),
            one.entry.sampling.repeats,
            drawn or "-",
            sections.train.batch_size(one.entry.sampling) if one.trained_on else "-",
            one.entry.source.caption_strategy,
        )
        lines.append("| " + " | ".join(_cell(str(cell)) for cell in cells) + " |")
    total = sum(drawn_per_epoch(one, sections.train) for one in measured if one.trained_on)
    lines += ["", f"Samples per epoch: {total}; pictures x (repeats + 1), less what fills no batch of its bucket."]
    return "\n".join(lines)


def _role(one: Measured) -> str:
    if not one.trained_on:
        return "held out"
    return "keeps the base's answers" if one.entry.sampling.is_regularisation_data else "trained on"


def _turns(sections: Sections, measured: Sequence[Measured]) -> str:
    """How likely each dataset's turn is, for each stage of the run."""
    train = sections.train
    if len(train.datasets) == 1 and len(stages(train.datasets)) == 1:
        return ""
    batches = {one.id: batches_per_epoch(one, train) for one in measured if one.trained_on}
    lines = [f"## Turns of the datasets\n\nBy {train.data_backend_sampling} and probability, until each has run out:\n"]
    for stage in stages(train.datasets):
        if not stage.datasets or stage.first > (train.max_train_steps or stage.first):
            continue
        weight = weights(train, {name: batches[name] for name in stage.datasets})
        shares = (f"`{name}` {100 * value / sum(weight.values()):.1f} %" for name, value in weight.items())
        lines.append(f"- {stage}: {', '.join(shares)}")
    return "\n".join(lines)


def _buckets(sections: Sections, measured: Sequence[Measured]) -> str:
    lines = ["## Buckets", "", "| dataset | bucket | size | pictures | |", "|---|---|---|---|---|"]
    for one in measured:
        kept = kept_buckets(one, sections.train)
        for name, sizes in sorted(one.buckets.items(), key=lambda item: float(item[0])):
            shapes = ", ".join(f"{width}x{height}" for width, height in sizes)
            remark = "" if name in kept or not one.trained_on else "left out: fills no batch"
            lines.append(f"| {_cell(one.id)} | {name} | {shapes} | {sizes.total()} | {remark} |")
    return "\n".join(lines)


def _skipped(measured: Sequence[Measured]) -> str:
    names = [(one.id, name, reason) for one in measured for name, reason in one.skipped]
    if not names:
        return ""
    lines = [
        "## Skipped pictures",
        "",
        *(f"- `{owner}/{on_one_line(name)}`: {reason}" for owner, name, reason in names[:_NAMED]),
    ]
    if len(names) > _NAMED:
        lines.append(f"- and {len(names) - _NAMED} more")
    return "\n".join(lines)


def _evaluation(sections: Sections) -> str:
    evaluate = sections.evaluate
    pictures = len(evaluate.prompts) * len(evaluate.resolutions) * evaluate.num_validation_images
    sizes = ", ".join(f"{width}x{height}" for width, height in evaluate.resolutions)
    held_out = ", ".join(evaluate.eval_datasets) or "none"
    score = f"`{evaluate.judge}`" if evaluate.judge else "none"
    return (
        f"## Evaluation\n\nValidation pictures: {pictures} ({len(evaluate.prompts)} prompts, {sizes}). "
        f"Held-out loss over: {held_out}. CLIP score by: {score}."
    )


def _notes(run: RunConfig) -> str:
    if not run.notes:
        return ""
    return "## Accepted without effect\n\n" + "\n".join(f"- {note}" for note in run.notes)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
