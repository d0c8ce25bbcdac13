"""Files and functions stay short, and light commands stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("src/kubetuner", "components", "pipelines")
HEAVY = ("torch", "diffusers", "transformers", "mlflow", "peft")


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", list(sources()), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"


@pytest.mark.parametrize(
    "statement",
    ["import kubetuner.cli.main", "import kubetuner.config.load", "import pipelines.finetune"],
)
def test_light_modules_load_nothing_heavy(statement: str) -> None:
    probe = f"import sys; {statement}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_the_family_switch_names_families() -> None:
    """Adding a family must not mean editing steps, training, data or pipelines."""
    allowed = {"config", "families"}
    names = ("pixart_sigma", "sdxl", "sana")
    offenders = []
    for path in sorted((ROOT / "src/kubetuner").rglob("*.py")):
        if path.relative_to(ROOT / "src/kubetuner").parts[0] in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in names:
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert offenders == []
