"""Tracking against a real MLflow server that hangs, dies, loses answers and comes back."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from kubetuner.errors import ArtifactError
from kubetuner.tracking import fetch_model, finish_parent, server, track
from tests.servers.mlflow_server import MlflowServer, Proxy, free_port

ROOT = Path(__file__).parents[2]
AT_ONCE = 5.0
"""Seconds that no call of a training loop comes near; MLflow's own client blocks 246 s on a dead server."""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Tracking to nowhere yet, into an experiment of this test alone; also for child processes."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "KUBETUNER_")):
            monkeypatch.delenv(name)
    values = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_EXPERIMENT_NAME": f"experiment of {tmp_path.name}",
        "KUBETUNER_RUN_ID": "pipeline-1",
        "KUBETUNER_SPOOL": str(tmp_path / "spool"),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(server, "WAIT_SECONDS", 3.0)
    return values


@pytest.fixture
def tracked(mlflow_server: MlflowServer, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """The server, tracked to."""
    environment["MLFLOW_TRACKING_URI"] = mlflow_server.url
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    return mlflow_server


def client_of(mlflow: MlflowServer) -> MlflowClient:
    return MlflowClient(mlflow.url)


def runs(client: MlflowClient) -> dict[str, Run]:
    """The test's runs by name, of which there is one each."""
    experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found), [run.info.run_name for run in found]
    return named


def points(client: MlflowClient, run: Run, key: str = "loss") -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def journals() -> list[Path]:
    return list(Path(os.environ["KUBETUNER_SPOOL"]).rglob("*.jsonl"))


def step_process(body: str) -> subprocess.Popen[str]:
    """A step as a process of its own, with the test's environment."""
    head = "import os, signal, sys, time\nfrom pathlib import Path\nfrom kubetuner.tracking import fetch_model, track\n"
    code = head + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_steps_of_separate_processes_and_the_model_between_them(tracked: MlflowServer, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "vae").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model / "vae" / "weights.safetensors").write_bytes(os.urandom(300_000))
    Image.new("RGB", (16, 16), (0, 90, 0)).save(tmp_path / "after.png")
    train = f"""
        with track("train", {{"seed": "7"}}) as run:
            for step in range(1, 51):
                run.log_metrics({{"loss": 1 / step, "lr": 0.5}}, step)
            print(run.log_model(Path({str(model)!r}), "sana-full"))
    """
    uri = ended(step_process(train)).strip()
    evaluate = f"""
        with track("evaluate", {{}}) as run:
            print(fetch_model({uri!r}, Path({str(tmp_path / "out")!r})))
            run.log_metrics({{"eval_loss/after": 0.25}}, 50)
            run.log_image("prompt/after", Path({str(tmp_path / "after.png")!r}), 50)
            run.log_text("<html>", "report.html")
    """
    fetched = Path(ended(step_process(evaluate)).strip())
    finish_parent("FINISHED")

    client = client_of(tracked)
    found = runs(client)
    assert set(found) == {"pipeline-1", "train", "evaluate"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    parent = found["pipeline-1"].info.run_id
    assert {found[name].data.tags["mlflow.parentRunId"] for name in ("train", "evaluate")} == {parent}
    assert points(client, found["train"]) == [(step, 1 / step) for step in range(1, 51)]
    assert found["train"].data.params == {"cfg/seed": "7"}
    evaluated = found["evaluate"].info.run_id
    assert [file.path for file in client.list_artifacts(evaluated) if not file.is_dir] == ["report.html"]
    assert len(client.list_artifacts(evaluated, "images")) == 2
    for name in ("model_index.json", "vae/weights.safetensors"):
        assert (fetched / name).read_bytes() == (model / name).read_bytes()
    logged = client.get_logged_model(uri.removeprefix("models:/"))
    assert (logged.source_run_id, str(logged.status)) == (found["train"].info.run_id, "READY")
    assert journals() == []


def test_steps_that_start_at_once_share_one_parent(tracked: MlflowServer, tmp_path: Path) -> None:
    step = """
        import mlflow
        Path({ready!r}).touch()
        while not Path({go!r}).exists():
            time.sleep(0.01)
        with track({name!r}, {{}}) as run:
            run.log_metrics({{"loss": 1.0}}, 1)
    """
    ready = [tmp_path / f"ready-{index}" for index in range(3)]
    steps = [
        step_process(step.format(ready=str(file), go=str(tmp_path / "go"), name=f"step-{index}"))
        for index, file in enumerate(ready)
    ]
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in ready) and time.monotonic() < deadline:
        time.sleep(0.05)
    (tmp_path / "go").touch()
    for process in steps:
        ended(process)

    found = runs(client_of(tracked))

    assert set(found) == {"pipeline-1", "step-0", "step-1", "step-2"}
    parents = {found[f"step-{index}"].data.tags["mlflow.parentRunId"] for index in range(3)}
    assert parents == {found["pipeline-1"].info.run_id}


def test_a_step_that_fails_says_why(tracked: MlflowServer) -> None:
    process = step_process("""
        with track("train", {}) as run:
            run.log_metrics({"loss": 1.0}, 1)
            raise RuntimeError("the loss is nan at step 2")
    """)
    assert process.communicate(timeout=120)[1].endswith("RuntimeError: the loss is nan at step 2\n")
    finish_parent("FAILED")

    found = runs(client_of(tracked))
    assert {name: run.info.status for name, run in found.items()} == {"pipeline-1": "FAILED", "train": "FAILED"}
    assert found["train"].data.tags["kubetuner.error"] == "RuntimeError: the loss is nan at step 2"


@pytest.mark.parametrize("repair", ["the step again", "the end of the pipeline", "another pipeline run"])
def test_a_killed_step_is_failed_by_who_comes_next(
    tracked: MlflowServer, monkeypatch: pytest.MonkeyPatch, repair: str
) -> None:
    process = step_process("""
        with track("train", {}) as run:
            for step in range(100):
                run.log_metrics({"loss": float(step)}, step)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    client = client_of(tracked)
    killed = runs(client)["train"].info.run_id
    assert client.get_run(killed).info.status == "RUNNING"

    if repair == "the end of the pipeline":
        finish_parent("FAILED")
    else:
        if repair == "another pipeline run":
            monkeypatch.setenv("KUBETUNER_RUN_ID", "pipeline-2")
        with track("next", {}):
            pass

    run = client.get_run(killed)
    assert run.info.status == "FAILED"
    assert "ended without a word" in run.data.tags["kubetuner.error"]
    assert points(client, run) == [(step, float(step)) for step in range(100)]
    assert journals() == []


def test_points_travel_in_batches(
    tracked: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Proxy(tracked.url) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        with track("train", {"a": "1"}) as run:
            for step in range(1500):
                run.log_metrics({"loss": step / 4, "lr": 0.5}, step)
    client = client_of(tracked)
    train = runs(client)["train"]
    assert points(client, train) == [(step, step / 4) for step in range(1500)]
    assert points(client, train, "lr") == [(step, 0.5) for step in range(1500)]
    assert 1 + 3 <= proxy.count("POST .*/runs/log-batch") <= 1 + 3 + 3  # parameters, 3000 points, early deliveries
    assert len(proxy.requests) < 30
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr().out == ""


def test_a_server_that_is_not_there_stops_nothing(
    mlflow_server: MlflowServer,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://alice:secret@127.0.0.1:{free_port()}")
    (tmp_path / "weights.safetensors").write_bytes(b"w")
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}")
    began = time.monotonic()
    with track("train", {}) as run:
        opened = time.monotonic()
        for step in range(2000):
            run.log_metrics({"loss": 1.0}, step)
        run.log_text("a", "a.txt")
        assert time.monotonic() - opened < AT_ONCE
        assert run.log_model(tmp_path, "m") == ""
        assert run.run_id == ""
    finish_parent("FINISHED")
    with pytest.raises(ArtifactError, match="models:/m-1 cannot be fetched"):
        fetch_model("models:/m-1", tmp_path / "out")
    assert time.monotonic() - began < 60  # of each call at most its few seconds of patience
    assert len(journals()) == 2
    assert "failed, will try again" in caplog.text
    assert "secret" not in caplog.text


def test_what_the_server_missed_is_sent_when_it_is_back(
    tracked: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole pipeline run with the server gone; the next pipeline run sends all of it, once."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    tracked.kill()
    with track("train", {"seed": "3"}) as run:
        for step in range(1200):
            run.log_metrics({"loss": step / 2}, step)
    with contextlib.suppress(ValueError), track("evaluate", {}) as run:
        run.log_image("a", tmp_path / "a.png", 1)
        raise ValueError("no CLIP")
    finish_parent("FAILED")
    assert len(journals()) == 3

    tracked.start()
    monkeypatch.setenv("KUBETUNER_RUN_ID", "pipeline-2")
    with track("push_to_hub", {}):
        pass
    finish_parent("FINISHED")

    client = client_of(tracked)
    found = runs(client)
    assert {name: run.info.status for name, run in found.items()} == {
        "pipeline-1": "FAILED",
        "train": "FINISHED",
        "evaluate": "FAILED",
        "pipeline-2": "FINISHED",
        "push_to_hub": "FINISHED",
    }
    assert found["train"].data.tags["mlflow.parentRunId"] == found["pipeline-1"].info.run_id
    assert found["train"].data.params == {"cfg/seed": "3"}
    assert points(client, found["train"]) == [(step, step / 2) for step in range(1200)]
    assert found["evaluate"].data.tags["kubetuner.error"] == "ValueError: no CLIP"
    assert len(client.list_artifacts(found["evaluate"].info.run_id, "images")) == 2
    assert journals() == []


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_a_server_that_fails_in_the_middle(
    tracked: MlflowServer, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    client = client_of(tracked)
    with track("train", {}) as run:
        for step in range(100):
            run.log_metrics({"loss": float(step)}, step)
        run.log_image("a", tmp_path / "a.png", 1)
        deadline = time.monotonic() + 30
        while len(client.list_artifacts(run.run_id, "images")) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        tracked.kill() if fault == "killed" else tracked.hang()
        began = time.monotonic()
        for step in range(100, 1300):
            run.log_metrics({"loss": float(step)}, step)
        assert time.monotonic() - began < AT_ONCE
    assert "sent by a later step" in caplog.text or "will try again" in caplog.text

    tracked.go_on()
    tracked.start()
    deadline = time.monotonic() + 60
    while journals() and time.monotonic() < deadline:  # the hung call of the first sender may still have the lock
        finish_parent("FINISHED")

    found = runs(client)
    assert {name: run.info.status for name, run in found.items()} == {"pipeline-1": "FINISHED", "train": "FINISHED"}
    assert points(client, found["train"]) == [(step, float(step)) for step in range(1300)]
    assert len(client.list_artifacts(found["train"].info.run_id, "images")) == 2


def test_a_server_that_comes_back_is_used_again(tracked: MlflowServer, tmp_path: Path) -> None:
    """The model of a step that began without a server arrives, after the points that were logged before."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"w" * 1000)
    tracked.hang()
    with track("train", {}) as run:
        for step in range(10):
            run.log_metrics({"loss": float(step)}, step)
        assert run.run_id == ""
        tracked.go_on()
        uri = run.log_model(tmp_path / "model", "m")
        assert uri
        assert points(client_of(tracked), client_of(tracked).get_run(run.run_id)) == [(s, float(s)) for s in range(10)]
    fetched = fetch_model(uri, tmp_path / "out")
    assert (fetched / "weights.safetensors").read_bytes() == b"w" * 1000
    assert {run.info.status for run in runs(client_of(tracked)).values()} == {"RUNNING", "FINISHED"}


@pytest.mark.parametrize("retries", ["0", "1"])
def test_lost_answers_make_nothing_twice(tracked: MlflowServer, monkeypatch: pytest.MonkeyPatch, retries: str) -> None:
    """Requests that were carried out and whose answer did not arrive: parent, child, points and end."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", retries)
    monkeypatch.setattr("kubetuner.tracking.sender.SEND_SECONDS", 0.05)
    with Proxy(tracked.url) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        proxy.lose_answer("POST .*/runs/create", times=2 * (1 + int(retries)))
        proxy.lose_answer("POST .*/runs/log-batch", times=3)
        proxy.lose_answer("POST .*/runs/update", times=1)
        with track("train", {"a": "1"}) as run:
            for step in range(20):
                run.log_metrics({"loss": float(step)}, step)
        deadline = time.monotonic() + 60
        while journals() and time.monotonic() < deadline:
            finish_parent("FINISHED")
        assert [fault.times for fault in proxy.faults] == [0, 0, 0]

    client = client_of(tracked)
    found = runs(client)
    assert set(found) == {"pipeline-1", "train"}
    assert points(client, found["train"]) == [(step, float(step)) for step in range(20)]
    assert found["train"].info.status == "FINISHED"
    assert found["train"].data.params == {"cfg/a": "1"}


def test_a_file_that_is_refused_holds_nothing_up(
    tracked: MlflowServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As an ingress does that takes no large bodies."""
    with Proxy(tracked.url) as proxy:
        proxy.refuse("PUT .*report.html", 413, times=99)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        with track("evaluate", {}) as run:
            run.log_text("<html>", "report.html")
            run.log_metrics({"clip": 0.5}, 1)
    found = runs(client_of(tracked))["evaluate"]
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"clip": 0.5}
    assert "MLflow refused text report.html" in caplog.text
    assert journals() == []


def test_a_new_local_database_takes_two_steps_at_once(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("KUBETUNER_MLFLOW_ARTIFACTS", str(tmp_path / "mlartifacts"))
    step = "with track({name!r}, {{}}) as run:\n    run.log_metrics({{'loss': 1.0}}, 1)"
    for process in [step_process(step.format(name=name)) for name in ("a", "b")]:
        ended(process)
    finish_parent("FINISHED")

    found = runs(MlflowClient(uri))
    assert {name: run.info.status for name, run in found.items()} == dict.fromkeys(["pipeline-1", "a", "b"], "FINISHED")
    assert {found[name].data.tags["mlflow.parentRunId"] for name in "ab"} == {found["pipeline-1"].info.run_id}


def test_what_kfp_caches_by_knows_no_run(tmp_path: Path) -> None:
    """The compiled pipeline, from which kfp makes its cache keys, is the same whatever run it is compiled in."""
    script = "import pathlib, sys\nfrom pipelines.compile import compile_pipeline\n"
    script += "compile_pipeline(pathlib.Path(sys.argv[1]))\n"
    texts = []
    for name in ("one", "two"):
        ids = {"KUBETUNER_RUN_ID": f"pipeline-{name}", "MLFLOW_RUN_ID": f"mlflow-{name}", "KUBETUNER_RUN_NAME": name}
        target = tmp_path / f"{name}.yaml"
        subprocess.run([sys.executable, "-c", script, str(target)], env=os.environ | ids, cwd=ROOT, check=True)
        texts.append(target.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert "pipeline_job_uuid" not in texts[0]  # kfp's placeholder for a run's id
