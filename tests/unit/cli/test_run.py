"""What a finished local run leaves in its folder and says at the end."""

import json
from pathlib import Path

import pytest

from kubetuner.artifacts import EvaluationArtifact, ModelArtifact, PublishedArtifact, write_artifact
from kubetuner.cli.run import _finish, _folder, _tracking
from kubetuner.config.load import load
from kubetuner.errors import InputError
from pipelines.local import LocalRun
from pipelines.local_log import TaskLog


def test_the_last_line_states_losses_and_the_report(tmp_path, capsys):
    run = tmp_path / "artifacts" / "run-1"
    folders: dict[str, Path] = {}
    for step, name in (("train", "model"), ("evaluate", "evaluation"), ("push-to-hub", "published")):
        folders[name] = run / step / name
        folders[name].mkdir(parents=True)
    (folders["evaluation"] / "report.html").write_text("<p>report")
    (folders["published"] / "hub").mkdir()
    (folders["published"] / "hub" / "README.md").write_text("card")
    model = ModelArtifact(
        fingerprint="m", family="sdxl", model_type="lora", base_model="b", base_revision="r", steps=7,
        first_loss=0.5, last_loss=0.25,
    )  # fmt: skip
    write_artifact(folders["model"], model)
    evaluation = EvaluationArtifact(fingerprint="e", eval_loss_before=0.4, eval_loss_after=0.3, metrics={}, images=())
    write_artifact(folders["evaluation"], evaluation)
    write_artifact(folders["published"], PublishedArtifact(fingerprint="p", url=str(folders["published"])))
    tasks = {
        "split": TaskLog(started=1.0, ended=2.0),
        "cache_vae": TaskLog(cached=True),
        "train": TaskLog(started=1.0, ended=3.5),
        "evaluate": TaskLog(started=4.0, ended=5.0),
    }
    _finish(LocalRun(folders, tasks, run), tmp_path, {"MLFLOW_TRACKING_URI": "sqlite:///x.db"}, "planned")
    shown = capsys.readouterr().out
    assert "0.5000 -> 0.2500" in shown.splitlines()[-1]
    assert "report.html" in shown.splitlines()[-1]
    assert "cache hit" in shown
    assert "1 of 3 steps were hits: cache_vae" in shown
    assert "split" not in shown
    assert "mlflow ui --backend-store-uri sqlite:///x.db" in shown
    assert "lora sdxl, 7 steps" in shown
    assert (tmp_path / "report.html").read_text() == "<p>report"
    assert (tmp_path / "hub" / "README.md").read_text() == "card"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds"] == {"cache_vae": 0.0, "train": 2.5, "evaluate": 1.0}
    assert summary["cache_hits"] == ["cache_vae"]


def test_the_folder_is_that_of_the_command_or_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "full", "model_family": "sana"}
    data = [{"id": "a", "instance_data_dir": "a"}]
    silent, named = load(config, data), load({**config, "output_dir": "models"}, data)
    assert _folder(None, named) == tmp_path / "models"
    assert _folder(Path("other"), named) == _folder(tmp_path / "other", silent) == tmp_path / "other"
    with pytest.raises(InputError, match=r"--out FOLDER, or as output_dir in config\.json"):
        _folder(None, silent)


def test_where_runs_are_tracked_reaches_the_steps():
    config = {"model_type": "full", "model_family": "sana"}
    data = [{"id": "a", "instance_data_dir": "a"}]
    assert _tracking(load({**config, "--report_to": "none"}, data)) == {"MLFLOW_TRACKING_URI": ""}
    assert _tracking(load({**config, "report_to": "mlflow"}, data)) == _tracking(load(config, data)) == {}
    named = {"tracker_project_name": "rings", "tracker_run_name": "weekly"}
    expected = {"MLFLOW_EXPERIMENT_NAME": "rings", "KUBETUNER_RUN_NAME": "weekly"}
    assert _tracking(load({**config, **named}, data)) == expected
