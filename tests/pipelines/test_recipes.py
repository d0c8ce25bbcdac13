"""Every recipe validates as it stands, and the table of their memory is what is predicted today."""

import json
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from PIL import Image

pytest.importorskip("diffusers")

from kubetuner.steps.plan import make_plan
from pipelines.recipes.table import DATA, FOLDER, README, recipes, row, train_section, with_table
from tests.unit.rounding import quantised


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    for name in ("photos", "held-out"):
        (root / "datasets" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (512, 512), (index, 0, 0)).save(root / "datasets" / name / f"a photo {index}.png")
    return root


def _needing_libraries() -> list[ParameterSet]:
    rounded = {recipe for recipe in recipes() if train_section(recipe).base_model_precision != "no_change"}
    return [pytest.param(recipe, marks=[quantised] if recipe in rounded else []) for recipe in recipes()]


@pytest.mark.parametrize("recipe", _needing_libraries(), ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_a_recipe_is_valid(recipe: Path, folder: Path) -> None:
    config, data = (json.loads(path.read_text()) for path in (recipe, recipe.parent / DATA))
    assert config["data_backend_config"] == f"pipelines/recipes/{recipe.parent.name}/{DATA}"
    assert config["model_family"] == recipe.parent.name
    assert make_plan(config, data, cwd=folder).summary["max_train_steps"] == 2000


def test_each_quickstart_has_a_variant_that_takes_less() -> None:
    assert {recipe.parent.name for recipe in recipes()} == {"pixart_sigma", "sdxl", "sana"}
    names = [recipe.relative_to(FOLDER).as_posix() for recipe in recipes()]
    text = README.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in names)
    assert len(names) == 7


def test_the_table_is_current() -> None:
    """Of the peaks one is checked; all of them take a minute."""
    text = README.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert [row.split("`")[1] for row in rows] == [recipe.relative_to(FOLDER).as_posix() for recipe in recipes()]
    assert row(FOLDER / "sana" / "config.json") in text, "run python -m pipelines.recipes.table"
    assert with_table(text, "rows\n").count("rows\n<!-- end -->") == 1
