"""Every component folder keeps to the rules that make it run on a cluster and under kfp.local alike."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "components").glob("*/component.py"))

# kfp 2.17 warns about its own defaults; nothing of ours to change.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:kfp", "ignore::FutureWarning:kfp")


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


def test_there_are_eight():
    names = "cache_text_embeds cache_vae download_dataset evaluate plan push_to_hub split train"
    assert [folder.name for folder in FOLDERS] == names.split()


def test_the_image_carries_everything(folder):
    component = getattr(importlib.import_module(f"components.{folder.name}"), folder.name)
    container = component.component_spec.implementation.container
    assert "pip install" not in " ".join(container.command)
    assert not container.image.endswith(":latest")
    assert len(component.component_spec.implementation.container.args[-1]) < 4096


def test_the_face_is_thin_and_imports_only_kfp(folder):
    source = (folder / "component.py").read_text(encoding="ascii")
    tree = ast.parse(source)
    tops = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert tops <= {"os", "typing", "kfp"}
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    code = function.body[-1].end_lineno - function.body[0].end_lineno
    assert code < 30


def test_metadata_and_readme_describe_the_parameters(folder):
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
    assert list(metadata)[:3] == ["name", "stability", "dependencies"]
    assert metadata["name"] == folder.name
    component = getattr(importlib.import_module(f"components.{folder.name}"), folder.name)
    readme = (folder / "README.md").read_text()
    described = set(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE))
    assert set(component.component_spec.inputs or {}) <= described


def test_split_lists_shards():
    from components.split import split

    parts = [json.loads(part) for part in split.python_func("{}", 3)]
    assert parts == [{"num_shards": 3, "section": "{}", "shard": shard} for shard in range(3)]
    assert len(split.python_func("{}", 0)) == 1
