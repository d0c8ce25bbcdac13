"""The train step through a TrainJob whose nodes really run, as processes that meet over gloo."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kubetuner.artifacts import ModelArtifact, describe_file, read_artifact, verify_files, write_artifact
from kubetuner.config.sections.steps import ModelRef, TrainSection
from kubetuner.config.trainjob import TrainJobSettings
from kubetuner.errors import ArtifactError, InputError
from kubetuner.steps.train import WorkerRequest, train
from kubetuner.steps.train_job import _fetch
from kubetuner.steps.train_node import group_of
from kubetuner.steps.train_node import main as node_main
from kubetuner.training.distributed.failures import exit_codes, known_error
from kubetuner.training.distributed.launch import Group
from kubetuner.training.interruption import TerminatedError
from kubetuner.trainjob import cluster as clusters
from kubetuner.trainjob import follow as following
from kubetuner.trainjob.cluster import Json
from tests.servers.kubernetes import KubernetesServer, pod_environment, tell_to_stop, wait_until
from tests.servers.trainer import LocalNodes
from tests.unit.steps.test_on_demand import _CROP, Place
from tests.unit.steps.test_train import _caches, _local, _section  # noqa: F401 - the fixture is used by being here
from tests.unit.steps.test_train_processes import ALONE, _losses

TWO = {"num_train_processes": 1, "num_machines": 2, "gradient_accumulation_steps": 1}
SHARED = {"mixed_precision": "no", "adam_epsilon": 1e-4, "model_type": "lora", "lora": {"rank": 2, "alpha": 8.0}}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared volume, and everything else that the environment says of the cluster."""
    mount = tmp_path / "workspace"
    mount.mkdir()
    settings = TrainJobSettings(workspace_pvc="shared", mount=str(mount), image="train:1", gpus=0, grace_seconds=60)
    monkeypatch.setenv("KUBETUNER_TRAINJOB", settings.to_json())
    monkeypatch.setattr(following, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(following, "GRACE_SECONDS", 1.0)
    return mount


@pytest.fixture
def server(tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    with KubernetesServer(tmp_path) as started:
        monkeypatch.setattr(clusters, "SERVICE_ACCOUNT", started.account)
        for name, value in pod_environment(started).items():
            monkeypatch.setenv(name, value)
        nodes = LocalNodes(started, {name: os.environ[name] for name in os.environ if name != "KUBETUNER_TRAINJOB"})
        yield started
        for name in list(nodes.running):
            nodes._stop(name)


def test_two_machines_train_what_one_does(
    tmp_path: Path, server: KubernetesServer, workspace: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    caches = _caches(tmp_path, "sana")
    with monkeypatch.context() as without:
        without.delenv("KUBETUNER_TRAINJOB")
        alone = train(_section(tmp_path, "sana", **SHARED, **ALONE), *caches, tmp_path / "alone")
    server.fail("GET .*/log$", 0)

    artifact = train(_section(tmp_path, "sana", **SHARED, **TWO), *caches, tmp_path / "two")

    assert artifact == read_artifact(tmp_path / "two", ModelArtifact)
    verify_files(tmp_path / "two", artifact)
    assert (artifact.num_processes, artifact.fingerprint) == (2, alone.fingerprint)
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "alone"), rel=1e-4)
    assert "2 of 2 nodes run" in caplog.text
    assert caplog.text.count("Trained to step 3") == 2  # By the one, and by the first node, in the log that was cut.
    wait_until(lambda: not server.jobs)
    assert not list((workspace / "kubetuner").iterdir())


def test_the_nodes_make_latents_of_pictures(
    tmp_path: Path, server: KubernetesServer, workspace: Path, bases: dict[str, ModelRef],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Those of one dataset are kept in the store, those of the other are not."""
    caplog.set_level("INFO")
    monkeypatch.setenv("KUBETUNER_STORE", str(workspace / "store"))
    place = Place(tmp_path, bases["sdxl"])
    place.write()
    others = {"id": "b", "instance_data_dir": "others", "vae_cache_disable": True, **_CROP}
    caches = place.caches("left", {"vae_cache_ondemand": True}, others)
    before = len(list((workspace / "store/shards").iterdir()))

    place.train(caches, "two", max_train_steps=3, **TWO)

    assert len(list((workspace / "store/shards").iterdir())) > before
    with monkeypatch.context() as without:
        without.delenv("KUBETUNER_TRAINJOB")
        place.train(caches, "alone", max_train_steps=3, **ALONE)
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "alone"), rel=1e-4)
    assert "Latents made when they were needed" in caplog.text
    assert not list((workspace / "kubetuner").iterdir())

    monkeypatch.delenv("KUBETUNER_STORE")
    with pytest.raises(InputError, match="KUBETUNER_STORE is not set"):
        place.train(caches, "three", max_train_steps=4, **TWO)
    assert not server.jobs


def test_a_run_that_is_stopped_goes_on_with_another_number_of_machines(
    tmp_path: Path, server: KubernetesServer, workspace: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    caches, out = _caches(tmp_path, "sana"), tmp_path / "out"
    settings = SHARED | {"max_train_steps": 40, "checkpoint_step_interval": 2}

    def tell() -> None:
        wait_until(lambda: list(workspace.glob("kubetuner/*/model/checkpoints/*/checkpoint-*")), 120)
        tell_to_stop()

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(TerminatedError, match=r"nodes are told to save a checkpoint\. Run again to resume"):
        train(_section(tmp_path, "sana", **settings, **TWO), *caches, out)
    teller.join()
    wait_until(lambda: not server.jobs)
    assert not out.exists()
    saved = [
        int(path.name.partition("-")[2]) for path in workspace.glob("kubetuner/*/model/checkpoints/*/checkpoint-*")
    ]

    server.when_created = _trains_here(server, _section(tmp_path, "sana", **settings, **ALONE), caches, monkeypatch)
    artifact = train(_section(tmp_path, "sana", **settings, **TWO), *caches, out)

    assert (artifact.num_processes, artifact.steps) == (1, 40)
    assert 0 < max(saved) < 40
    assert f"Resuming after step {max(saved)} of 40" in caplog.text
    assert len(_losses(out)) == 40
    assert not list((workspace / "kubetuner").iterdir())


def test_a_model_that_is_there_already_is_only_fetched(
    tmp_path: Path, server: KubernetesServer, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step was killed after the TrainJob had ended."""
    caches, section = _caches(tmp_path, "sana"), _section(tmp_path, "sana", **SHARED, **TWO)
    fetched: list[Path] = []

    def killed(model: Path, out: Path) -> ModelArtifact:
        fetched.append(model)
        raise KeyboardInterrupt

    server.when_created = _trains_here(server, _section(tmp_path, "sana", **SHARED, **ALONE), caches, monkeypatch)
    with monkeypatch.context() as dying:
        dying.setattr("kubetuner.steps.train_job._fetch", killed)
        with pytest.raises(KeyboardInterrupt):
            train(section, *caches, tmp_path / "out")
    assert (fetched[0] / "artifact.json").is_file()
    asked = len(server.asked)

    artifact = train(section, *caches, tmp_path / "out")

    verify_files(tmp_path / "out", artifact)
    assert [line.split()[0] for line in server.asked[asked:]] == ["DELETE"]
    assert not list((workspace / "kubetuner").iterdir())


def test_a_damaged_model_is_made_anew(tmp_path: Path, server: KubernetesServer, workspace: Path) -> None:
    """Only what it was told to be is taken."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "losses.jsonl").write_text("{}")
    entry = describe_file(model, "losses.jsonl")
    made = ModelArtifact(
        fingerprint="f", files=(entry,), family="sana", model_type="lora", base_model="b", base_revision="r", steps=1,
        first_loss=1.0, last_loss=1.0,
    )  # fmt: skip
    write_artifact(model, made)
    (model / "losses.jsonl").write_text("[]")

    with pytest.raises(ArtifactError, match="damaged"):
        _fetch(model, tmp_path / "out")

    assert not (model / "artifact.json").exists()
    assert not (tmp_path / "out").exists()


def test_everything_wrong_with_the_place_is_told_before_anything_is_asked(
    tmp_path: Path, server: KubernetesServer, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches, section = (
        _caches(tmp_path, "sana"),
        _section(tmp_path, "sana", **SHARED, **TWO | {"num_train_processes": 3}),
    )
    settings = TrainJobSettings(workspace_pvc="shared", mount=str(tmp_path / "none"), gpus=2)
    monkeypatch.setenv("KUBETUNER_TRAINJOB", settings.to_json())
    monkeypatch.setenv("KUBETUNER_STORE", str(tmp_path / "store"))

    with pytest.raises(InputError) as caught:
        train(section, *caches, tmp_path / "out")

    parts = ("KUBETUNER_STORE is", "none is no folder; the claim 'shared' must be mounted", "image is empty")
    for part in (*parts, "each node has 2 GPU"):
        assert part in str(caught.value)
    assert not server.asked

    monkeypatch.delenv("KUBETUNER_TRAINJOB")
    with pytest.raises(InputError, match="num_machines is 2, and KUBETUNER_TRAINJOB does not say"):
        train(section, *caches, tmp_path / "out")


def test_a_right_that_is_missing_is_found_before_anything_is_copied(
    tmp_path: Path, server: KubernetesServer, workspace: Path
) -> None:
    server.fail("/log$", 403, message="pods/log is forbidden")
    with pytest.raises(InputError, match=r"pods/log is forbidden\. It needs the Role"):
        train(_section(tmp_path, "sana", **SHARED, **TWO), *_caches(tmp_path, "sana"), tmp_path / "out")
    assert not list(workspace.iterdir())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, r"no node of a TrainJob.*PET_NNODES is None; PET_NODE_RANK is None.*PET_MASTER_ADDR is missing"),
        ({"PET_NNODES": "auto"}, "PET_NNODES is 'auto'"),
    ],
)
def test_a_node_that_does_not_know_its_place(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        group_of(environment, 1)


def test_a_node_knows_its_place() -> None:
    places = {
        "PET_NNODES": "3",
        "PET_NODE_RANK": "2",
        "PET_MASTER_ADDR": "job-node-0-0.job",
        "PET_MASTER_PORT": "29500",
    }
    assert group_of(places, 4) == Group(4, "job-node-0-0.job", 29500, machines=3, machine=2)


def test_a_node_without_its_task_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert node_main(tmp_path) == 2
    assert "is the claim mounted?" in capsys.readouterr().err
    assert isinstance(known_error(tmp_path), InputError)


def test_a_node_leaves_word_of_what_its_processes_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = _section(tmp_path, "sana", **SHARED, **TWO)
    missing = (tmp_path / "nothing",)
    request = WorkerRequest(section=section, latents=missing, text_embeds=missing, out=tmp_path / "out")
    (tmp_path / "argument").write_text(request.model_dump_json())
    places = {"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29500"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)

    assert node_main(tmp_path) == 1

    assert exit_codes(tmp_path) == ({0: 1}, 1)
    assert isinstance(known_error(tmp_path), ArtifactError)
    assert "error: node 0: " in capsys.readouterr().err


def _trains_here(
    server: KubernetesServer,
    section: TrainSection,
    caches: tuple[list[Path], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Json], None]:
    """A cluster that does a TrainJob's work in this process, as one node of one process would."""

    def work(job: Json) -> None:
        with monkeypatch.context() as without:
            without.delenv("KUBETUNER_TRAINJOB")
            train(section, *caches, Path(job["spec"]["trainer"]["args"][0]).parent / "model")
        server.end(job["metadata"]["name"], "Complete")

    server.when_deleted = lambda _name: None
    return work
