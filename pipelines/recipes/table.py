"""The table of recipes in ``README.md``, with the GPU memory that each is predicted to take.

``python -m pipelines.recipes.table`` writes it anew.
"""

from pathlib import Path

from kubetuner.config.json_file import read_json
from kubetuner.config.load import load
from kubetuner.config.models import OUTLINES
from kubetuner.config.sections.steps import TrainSection
from kubetuner.steps.planning.memory import GIB, smallest_card
from kubetuner.training.memory.prediction import Predictor, Shapes

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
DATA = "multidatabackend.json"
EDGE = 1024
_BEGIN, _END = "<!-- begin: python -m pipelines.recipes.table -->\n", "<!-- end -->"


def recipes() -> list[Path]:
    """The configuration files of all families' recipes."""
    return sorted(path for family in OUTLINES for path in (FOLDER / family).glob("*.json") if path.name != DATA)


def train_section(recipe: Path) -> TrainSection:
    """The recipe's training, as it is written."""
    config, data = read_json(recipe), read_json(recipe.parent / DATA)
    if not isinstance(config, dict) or not isinstance(data, list):
        raise TypeError(f"{recipe} is no object, or its {DATA} no list")
    return load(config, data, cwd=FOLDER.parents[1]).sections.train


def table() -> str:
    """The rows, predicted for 1024x1024 pictures and captions of full length."""
    head = "| recipe | training | base | optimizer | batch | predicted peak | GPU |\n|---|---|---|---|---|---|---|\n"
    return head + "".join(row(recipe) for recipe in recipes())


def row(recipe: Path) -> str:
    """One line of the table."""
    train = train_section(recipe)
    outline = OUTLINES[train.model.family]
    edge = EDGE // outline.vae_factor
    shapes = Shapes((outline.latent_channels, edge, edge), outline.text_floats // outline.text_width)
    peak = Predictor(shapes).predict(train).peak
    name = recipe.relative_to(FOLDER).as_posix()
    cells = (
        f"[`{name}`]({name})",
        "full" if train.lora is None else f"{train.lora.title}, rank {train.lora.rank}",
        train.base_model_precision if train.base_model_precision != "no_change" else "as published",
        train.optimizer,
        f"{train.train_batch_size} x {train.gradient_accumulation_steps}",
        f"{peak / GIB:.1f} GiB",
        f"{smallest_card(peak)} GiB",
    )
    return f"| {' | '.join(cells)} |\n"


def with_table(text: str, rows: str) -> str:
    """``text`` with its table replaced."""
    before, rest = text.split(_BEGIN)
    return f"{before}{_BEGIN}{rows}{_END}{rest.split(_END)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8"), table()), encoding="utf-8")
