"""The model card: the README.md that the hub shows."""

import json
import shutil
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from kubetuner import __version__
from kubetuner.artifacts import EvaluationArtifact, ModelArtifact
from kubetuner.config.sections import PushSection

# Settings of the train section that a reader of the card wants to know; anything else, paths above all, stays out.
TRAINING_FACTS = (
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "optimizer",
    "train_batch_size",
    "gradient_accumulation_steps",
    "mixed_precision",
    "max_grad_norm",
    "caption_dropout_probability",
    "seed",
)


def write_card(
    section: PushSection, model: ModelArtifact, evaluation: EvaluationArtifact, pictures: Path, folder: Path
) -> None:
    """Write ``folder/README.md`` and copy the validation pictures to ``folder/images/``.

    Args:
        section: Visibility, note and training facts.
        model: What was trained.
        evaluation: Its losses and pictures.
        pictures: The folder that the pictures' paths are relative to.
        folder: The model's folder, as it will be uploaded.
    """
    from kubetuner.families import load_family

    gallery = [
        {"prompt": image.prompt, "path": f"images/{Path(image.after).name}", "source": image.after}
        for image in evaluation.images
    ]
    (folder / "images").mkdir(exist_ok=True)
    for picture in gallery:
        shutil.copyfile(pictures / picture["source"], folder / picture["path"])
    training = json.loads(section.training)
    environment = Environment(
        loader=PackageLoader("kubetuner.publishing", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = json.dumps
    card = environment.get_template("card.md.jinja").render(
        title=section.hub_model_id.rsplit("/", 1)[-1] or folder.name,
        base=_public(model.base_model),
        facts=load_family(section.model.family).facts,
        model=model,
        evaluation=evaluation,
        gallery=gallery,
        note=section.note,
        safe=section.safe_for_work,
        training={name: training[name] for name in TRAINING_FACTS if name in training},
        version=__version__,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _public(base_model: str) -> str:
    """The base as a stranger may see it: a hub id, or a local folder's name without its path."""
    return Path(base_model).name if Path(base_model).exists() else base_model
