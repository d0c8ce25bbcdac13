"""Steps that log to a local SQLite store."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from kubetuner.errors import ArtifactError
from kubetuner.tracking import fetch_model, finish_parent, track
from kubetuner.tracking.journal import Entry, Journal
from kubetuner.tracking.server import Settings

# MLflow's own dependencies warn while it creates its database.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def runs(database: str, experiment: str) -> dict[str, Run]:
    """The experiment's runs by name, of which there is one each."""
    client = MlflowClient(database)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found), [run.info.run_name for run in found]
    return named


def spooled(folder: Path) -> list[Path]:
    return list(folder.rglob("*.jsonl"))


@pytest.mark.usefixtures("untracked")
def test_without_a_tracking_uri_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNER_RUN_ID", "g")
    monkeypatch.setenv("KUBETUNER_SPOOL", str(tmp_path / "spool"))
    with track("train", {"seed": "1"}) as run:
        run.log_metrics({"loss": 1.0}, 1)
        run.log_image("a", tmp_path / "missing.png", 1)
        run.log_text("a", "a.txt")
        assert run.log_model(tmp_path, "m") == ""
        assert run.run_id == ""
    finish_parent("FINISHED")
    assert not (tmp_path / "spool").exists()
    with pytest.raises(ArtifactError, match="MLFLOW_TRACKING_URI"):
        fetch_model("models:/m-1", tmp_path)


@pytest.mark.usefixtures("untracked")
def test_without_a_tracking_uri_mlflow_is_not_imported() -> None:
    script = "import sys, kubetuner.tracking as t\nwith t.track('train', {}): pass\nassert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.usefixtures("tracked")
def test_of_distributed_processes_only_the_first_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with track("train", {}) as run:
        run.log_metrics({"loss": 1.0}, 1)
    assert not (tmp_path / "spool").exists()


def test_parameters_points_pictures_and_texts_arrive(
    database: str, tracked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (16, 8), (200, 10, 10)).save(tmp_path / "a.png")
    with track("train", {"seed": "7", "base model": "a/b", "empty": "", "long": "x" * 7000}) as run:
        for step in range(1, 2502):
            run.log_metrics({"loss": 1 / step, "lr": 1e-4 * step}, step)
        run.log_metrics({"loss": math.nan, "kept": 3.0}, 2502)
        run.log_metrics({"loss": math.inf, "odd//key/../é" + "k" * 300: 4.0}, 2503)
        run.log_image("samples/a", tmp_path / "a.png", 5)
        run.log_text("grüße", "notes/a.txt")

    found = runs(database, tracked)["train"]
    client = MlflowClient(database)
    assert run.run_id == found.info.run_id
    assert found.info.status == "FINISHED"
    assert found.data.params == {
        "cfg/seed": "7",
        "cfg/base model": "a/b",
        "cfg/empty": "",
        "cfg/long": "x" * 6000,
    }
    history = client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 2502)]
    assert all(a.timestamp <= b.timestamp for a, b in itertools.pairwise(history))
    assert [point.step for point in client.get_metric_history(run.run_id, "lr")] == list(range(1, 2502))
    assert found.data.metrics["kept"] == 3.0
    assert [name for name, value in found.data.metrics.items() if value == 4.0] == ["odd/_" + "k" * 237]
    warned = [record.message for record in caplog.records if "not finite" in record.message]
    assert warned == ["metric loss is nan at step 2502; points that are not finite are left out"]
    pictures = sorted(file.path for file in client.list_artifacts(run.run_id, "images"))
    assert {Path(path).suffix for path in pictures} == {".png", ".webp"}
    assert all("samples~a+step+5+" in path for path in pictures)
    png = next(path for path in pictures if path.endswith(".png"))
    with Image.open(client.download_artifacts(run.run_id, png, str(tmp_path))) as drawn:
        assert drawn.getpixel((3, 3)) == (200, 10, 10)
    text = client.download_artifacts(run.run_id, "notes/a.txt", str(tmp_path))
    assert Path(text).read_text(encoding="utf-8") == "grüße"
    assert spooled(tmp_path / "spool") == []


def test_a_picture_that_cannot_be_read_holds_nothing_up(
    database: str, tracked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:70])
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg")
    with track("evaluate", {}) as run:
        for name in ("gone.png", "text.png", "cut.png", "print.jpg", "odd\udcff.png"):
            run.log_image(Path(name).stem, tmp_path / name, 1)
        run.log_metrics({"clip": 0.5}, 1)

    found = runs(database, tracked)["evaluate"]
    assert found.data.metrics == {"clip": 0.5}
    assert found.info.status == "FINISHED"
    assert sum("is not logged" in record.message for record in caplog.records) == 4
    pictures = [file.path for file in MlflowClient(database).list_artifacts(run.run_id, "images")]
    assert {Path(path).name.split("+")[0] for path in pictures} == {"print"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("loss is nan\nat step 3"), "ValueError: loss is nan\nat step 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (OSError("http://user:secret@host/x \udcff"), "OSError: http://***@host/x ?"),
    ],
)
def test_a_step_that_raises_is_failed_and_says_why(
    database: str, tracked: str, error: BaseException, reason: str
) -> None:
    def step() -> None:
        with track("train", {}) as run:
            run.log_metrics({"loss": 2.0}, 1)
            raise error

    with pytest.raises(type(error)):
        step()

    found = runs(database, tracked)["train"]
    assert found.info.status == "FAILED"
    assert found.info.end_time >= found.info.start_time
    assert found.data.tags["kubetuner.error"] == reason
    assert found.data.metrics == {"loss": 2.0}


def test_the_model_comes_back_with_equal_bytes(database: str, tracked: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 4096)
    with track("train", {}) as run:
        uri = run.log_model(model, "sdxl-full")
        run_id = run.run_id
    assert uri.startswith("models:/m-")

    fetched = fetch_model(uri, tmp_path / "out")

    files = {path.relative_to(model): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert {path.relative_to(fetched): path.read_bytes() for path in fetched.rglob("*") if path.is_file()} == files
    logged = MlflowClient(database).get_logged_model(uri.removeprefix("models:/"))
    assert (logged.name, logged.source_run_id, str(logged.status)) == ("sdxl-full", run_id, "READY")
    with pytest.raises(ArtifactError, match=r"models:/m-none cannot be fetched from MLflow: .*m-none"):
        fetch_model("models:/m-none", tmp_path / "none")


def test_steps_of_one_run_are_children_of_one_parent(
    database: str, tracked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBETUNER_RUN_ID", "it's")
    monkeypatch.setenv("KUBETUNER_RUN_NAME", "cats 3")
    for step in ("train", "evaluate"):
        with track(step, {}):
            pass
    found = runs(database, tracked)
    assert set(found) == {"cats 3", "train", "evaluate"}
    assert found["cats 3"].info.status == "RUNNING"
    assert found["cats 3"].data.tags["kubetuner.run_id"] == "its"
    for step in ("train", "evaluate"):
        assert found[step].data.tags["mlflow.parentRunId"] == found["cats 3"].info.run_id

    finish_parent("FINISHED")

    found = runs(database, tracked)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert found["cats 3"].info.end_time >= found["evaluate"].info.end_time


def test_a_failed_pipeline_ends_its_parent_and_what_still_runs(
    database: str, tracked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBETUNER_RUN_ID", "g")
    with track("train", {}):
        pass
    found = runs(database, tracked)
    lost = MlflowClient(database).create_run(
        found["g"].info.experiment_id, run_name="lost", tags={"mlflow.parentRunId": found["g"].info.run_id}
    )  # what a step leaves whose machine is gone, spool included

    finish_parent("FAILED")

    states = {name: run.info.status for name, run in runs(database, tracked).items()}
    assert states == {"g": "FAILED", "train": "FINISHED", "lost": "FAILED"}
    assert lost.info.status == "RUNNING"
    assert spooled(tmp_path / "spool") == []


def test_a_second_parent_is_merged_into_the_first(database: str, tracked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines without a common spool made one each."""
    monkeypatch.setenv("KUBETUNER_RUN_ID", "g")
    with track("train", {}):
        pass
    client = MlflowClient(database)
    first = runs(database, tracked)["g"].info
    tags = {"kubetuner.run_id": "g", "kubetuner.role": "parent"}
    second = client.create_run(first.experiment_id, run_name="second", tags=tags)
    child = client.create_run(first.experiment_id, run_name="b", tags={"mlflow.parentRunId": second.info.run_id})
    client.set_terminated(child.info.run_id)

    finish_parent("FINISHED")

    found = runs(database, tracked)
    assert {name: run.info.status for name, run in found.items()} == dict.fromkeys(["g", "train", "b"], "FINISHED")
    assert {found[name].data.tags["mlflow.parentRunId"] for name in ("train", "b")} == {first.run_id}


def test_a_pipeline_that_failed_before_any_tracked_step_is_seen(
    database: str, tracked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBETUNER_RUN_ID", "early")
    finish_parent("FAILED")
    assert {name: run.info.status for name, run in runs(database, tracked).items()} == {"early": "FAILED"}


def test_a_run_of_another_owner_is_used_and_not_ended(
    database: str, tracked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(database)
    owned = client.create_run(client.create_experiment(tracked, str(tmp_path / "art")), run_name="kubeflow's")
    client.log_param(owned.info.run_id, "cfg/seed", "1")
    monkeypatch.setenv("MLFLOW_RUN_ID", owned.info.run_id)
    monkeypatch.setenv("KUBETUNER_RUN_ID", "g")
    with track("train", {"seed": "2"}) as run:  # a parameter that cannot change holds nothing up
        run.log_metrics({"loss": 1.5}, 3)
        assert run.run_id == owned.info.run_id
    with pytest.raises(ValueError, match="bad"), track("evaluate", {}):
        raise ValueError("bad")
    finish_parent("FAILED")

    found = runs(database, tracked)
    assert set(found) == {"kubeflow's"}
    assert found["kubeflow's"].info.status == "RUNNING"
    assert found["kubeflow's"].data.metrics == {"loss": 1.5}
    assert found["kubeflow's"].data.params == {"cfg/seed": "1"}
    assert spooled(tmp_path / "spool") == []


def test_what_an_earlier_pipeline_run_left_is_sent(
    database: str, tracked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.create(Settings.from_environment().spools()[0])
    journal.append(Entry(kind="start", key="train", text="old", time=5000))
    journal.append(*(Entry(kind="metric", key="loss", value=step, step=step, time=6000) for step in range(3)))
    journal.close(delivered=False)  # as when it was killed while the server was away
    (journal.path.parent / "strange.jsonl").write_text("?\n")
    monkeypatch.setenv("KUBETUNER_RUN_ID", "new")
    with track("evaluate", {}):
        pass

    found = runs(database, tracked)
    assert set(found) == {"old", "train", "new", "evaluate"}
    assert found["train"].info.status == "FAILED"
    assert (found["train"].info.start_time, found["train"].info.end_time) == (5000, 6000)
    assert "ended without a word" in found["train"].data.tags["kubetuner.error"]
    assert found["train"].data.tags["mlflow.parentRunId"] == found["old"].info.run_id
    points = MlflowClient(database).get_metric_history(found["train"].info.run_id, "loss")
    assert [point.value for point in points] == [0, 1, 2]
    assert [path.name for path in spooled(tmp_path / "spool")] == ["strange.jsonl"]


def test_a_spool_that_cannot_be_written_is_replaced(
    database: str, tracked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool").write_text("in the way")
    with track("train", {}) as run:
        run.log_metrics({"loss": 1.0}, 1)
        assert len(spooled(tmp_path / "tmp")) == 1
    assert runs(database, tracked)["train"].data.metrics == {"loss": 1.0}
    assert spooled(tmp_path / "tmp") == []
    assert f"the spool folder {tmp_path / 'spool'}" in caplog.text


@pytest.mark.usefixtures("tracked")
def test_with_no_spool_at_all_the_step_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool").write_text("in the way")
    (tmp_path / "blocked").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "blocked"))
    monkeypatch.setattr("tempfile.tempdir", None)
    Settings.from_environment().spools()[1].parent.write_text("in the way")
    with track("train", {}) as run:
        run.log_metrics({"loss": 1.0}, 1)
        assert run.log_model(tmp_path, "m") == ""
    finish_parent("FINISHED")
    assert "nothing is tracked" in caplog.text
