"""The command: exit codes, speed of help, and messages."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from kubetuner.cli import main as module
from kubetuner.cli.checkout import add_checkout_to_path
from kubetuner.errors import InputError, StepError


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        module.main(arguments)
    return caught.value.code


def test_help_is_instant_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom kubetuner.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'mlflow', 'kfp', 'diffusers', 'pydantic') if n in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 1.0
    assert "Fine-tune diffusion models" in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("bad key"), 2), (StepError("it broke"), 1), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def fail(**_settings: object) -> None:
        raise error

    monkeypatch.setattr(module.cli, "main", fail)
    assert call() == code
    assert (str(error) or "interrupted") in capsys.readouterr().err


def test_validate_lists_every_problem(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lora", "model_family": "sdxxl", "nonsense": 1}))
    (tmp_path / "data.json").write_text("[]")
    code = call("validate", "--config", str(tmp_path / "config.json"), "--data", str(tmp_path / "data.json"))
    shown = capsys.readouterr().err
    assert code == 2
    assert "sdxxl" in shown
    assert "nonsense" in shown


def test_a_missing_data_file_is_explained(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert call("validate", "--config", str(tmp_path / "config.json")) == 2
    assert "--data FILE" in capsys.readouterr().err
    assert call("validate", "--config", str(tmp_path / "none.json")) == 2
    assert "none.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope", "--out", "x"], "there is no step 'nope'"),
        (["train", "--out", "x"], "--section FILE is missing"),
        (["train", "--out", "x", "--in", "y"], "expected NAME=FOLDER"),
        (["cache_vae", "--out", "x", "--shard", "2", "--num-shards", "2"], "expected 0 to 1"),
    ],
)
def test_step_explains_what_is_wrong(capsys, arguments, message):
    assert call("step", *arguments) == 2
    assert message in capsys.readouterr().err


def test_step_refuses_a_section_of_another_step(tmp_path, capsys):
    section = tmp_path / "section.json"
    section.write_text('{"datasets": 3}')
    assert call("step", "download-dataset", "--section", str(section), "--out", str(tmp_path / "out")) == 2
    assert "not a DownloadSection" in capsys.readouterr().err


def test_the_checkout_is_found():
    assert (add_checkout_to_path() / "pipelines" / "finetune.py").is_file()


def test_several_machines_are_not_here(tmp_path, capsys, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(24):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(pictures / f"{number}.png")
    base = Path(__file__).parents[3] / "pipelines/recipes/demo/bases/sana"
    config = {
        "model_type": "full",
        "model_family": "sana",
        "pretrained_model_name_or_path": str(base),
        "num_machines": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = [{"id": "a", "instance_data_dir": str(pictures), "resolution": 64, "resolution_type": "pixel"}]
    (tmp_path / "data.json").write_text(json.dumps(data))
    files = (
        "--config",
        str(tmp_path / "config.json"),
        "--data",
        str(tmp_path / "data.json"),
        "--out",
        str(tmp_path / "o"),
    )

    assert call("run", *files) == 2
    assert "num_machines: is 2, and KUBETUNER_TRAINJOB does not say" in capsys.readouterr().err
    monkeypatch.setenv("KUBETUNER_TRAINJOB", '{"workspace_pvc": "shared"}')
    assert call("run", *files) == 2
    assert "num_machines is 2, and kubetuner run uses this machine alone; set it to 1" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
