"""A TrainJob from its submission to its end."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kubetuner.config.trainjob import TrainJobSettings
from kubetuner.errors import DatasetError, TrainingError
from kubetuner.training.distributed.failures import report, report_codes
from kubetuner.training.interruption import StopRequest, TerminatedError
from kubetuner.trainjob.cluster import Cluster, Json
from kubetuner.trainjob.follow import follow, submit
from kubetuner.trainjob.manifest import make_trainjob
from tests.servers.kubernetes import KubernetesServer, tell_to_stop, wait_until
from tests.unit.trainjob.conftest import NAME

RUNS = {"state": {"running": {}}}
PULLS = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "train:1"'}}}
STARTS = {"state": {"waiting": {"reason": "ContainerCreating"}}}
NO_ROOM = {
    "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
    "message": "0/3 nodes are available: 3 Insufficient gpu",
}  # fmt: skip


def ended(code: int, reason: str = "Error") -> Json:
    return {"terminated": {"exitCode": code, "reason": reason}}


@pytest.fixture
def run(cluster: Cluster, server: KubernetesServer, job: Json, words: Path, stop: StopRequest) -> Callable[..., None]:
    """Submit and follow, while ``meanwhile`` happens beside it; ``pods`` are there from the start."""

    def act(*pods: Json, meanwhile: Callable[[], object] = lambda: None, start_minutes: float = 60.0) -> None:
        def create(_job: Json) -> None:
            for node, container in enumerate(pods):
                server.add_pod(NAME, node, container)

        server.when_created = create
        submit(cluster, job, words, stop)
        beside = threading.Thread(target=meanwhile)
        beside.start()
        try:
            follow(cluster, job, words, start_minutes, stop)
        finally:
            beside.join()

    return act


def test_the_log_is_shown_once_whatever_is_cut(
    run: Callable[..., None], server: KubernetesServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    server.fail("GET .*/log$", 0, 2)
    server.fail("GET .*/trainjobs/", 503, 2)
    expected = [f"step {number}" for number in range(60)]

    def shown(line: str) -> bool:
        return line in caplog.messages

    def prints() -> None:
        wait_until(lambda: server.pods)
        first = server.pods[0]["metadata"]["name"]
        for number, line in enumerate(expected):
            server.print(first, line)
            server.print(server.pods[1]["metadata"]["name"], "of the other node")
            if number % 20 == 10:
                server.fail("GET .*/log$", 0)
                wait_until(partial(shown, line))
        server.end(NAME, "Complete")

    run(RUNS, RUNS, meanwhile=prints)

    assert [message for message in caplog.messages if message.startswith("step ")] == expected
    assert "of the other node" not in caplog.messages
    assert f"TrainJob team/{NAME} was submitted: 2 nodes" in caplog.messages
    assert f"TrainJob {NAME}: 2 of 2 nodes run" in caplog.messages
    assert NAME in server.jobs


def test_the_wait_for_machines_is_told(
    run: Callable[..., None], server: KubernetesServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    server.warn(f"{NAME}-node-0", "FailedCreate", "exceeded quota: gpus")
    server.warn("another", "FailedCreate", "not ours")

    def starts() -> None:
        wait_until(lambda: "0 of 2 nodes run" in caplog.text)
        with server.lock:
            server.pods[0]["status"]["containerStatuses"][1]["state"] = {"running": {}}
            server.pods[1]["status"]["conditions"] = [NO_ROOM]
        wait_until(lambda: "1 of 2 nodes run" in caplog.text)
        with server.lock:
            server.pods[1]["status"]["containerStatuses"][1]["state"] = {"running": {}}
        wait_until(lambda: "2 of 2 nodes run" in caplog.text)
        server.end(NAME, "Complete")

    run(STARTS, STARTS, meanwhile=starts)

    assert "node 0: ContainerCreating" in caplog.text
    assert "node 1: Unschedulable: 0/3 nodes are available: 3 Insufficient gpu" in caplog.text
    assert f"{NAME}-node-0: FailedCreate: exceeded quota: gpus" in caplog.text
    assert "not ours" not in caplog.text


def test_a_queue_may_take_any_time(run: Callable[..., None], server: KubernetesServer, caplog) -> None:
    caplog.set_level("INFO")

    def queue() -> None:
        server.end(NAME, "Suspended", "waiting for quota in ClusterQueue research")
        wait_until(lambda: "suspended: waiting for quota in ClusterQueue research" in caplog.text)
        server.end(NAME, "Complete")

    server.when_created = lambda _job: server.end(NAME, "Suspended")
    run(meanwhile=queue, start_minutes=1e-9)


def test_what_cannot_start(run: Callable[..., None], server: KubernetesServer) -> None:
    with pytest.raises(
        TrainingError, match=r'cannot start: node 1: ImagePullBackOff: Back-off pulling image "train:1"'
    ):
        run(RUNS, PULLS)
    wait_until(lambda: not server.jobs)


@pytest.mark.parametrize(
    ("pods", "reason"),
    [((RUNS, STARTS), "node 1: ContainerCreating"), ((), "does the controller of Kubeflow Trainer run")],
)
def test_what_does_not_start_in_time(
    run: Callable[..., None], server: KubernetesServer, pods: tuple[Json, ...], reason: str
) -> None:
    with pytest.raises(TrainingError, match=rf"not started after 0.001 minutes \(start_minutes(.|\n)*{reason}"):
        run(*pods, start_minutes=0.001)
    wait_until(lambda: not server.jobs)


def test_the_first_error_of_a_node_is_the_one(run: Callable[..., None], server: KubernetesServer, words: Path) -> None:
    def fails() -> None:
        report(words, 3, RuntimeError("Connection closed by peer"))
        report(words, 1, DatasetError("a/b.png is damaged"))

    with pytest.raises(DatasetError, match=r"^a/b\.png is damaged$"):
        run(RUNS, RUNS, meanwhile=fails)
    wait_until(lambda: not server.jobs)


@pytest.mark.parametrize(
    ("container", "codes", "message"),
    [
        ({"state": ended(137, "OOMKilled")}, {}, r"node 1 of 2 was ended: OOMKilled, exit code 137; give it more"),
        ({"lastState": ended(137, "OOMKilled")} | RUNS, {0: 1}, r"node 1 of 2 was ended: OOMKilled, exit code 137"),
        ({"state": ended(1)}, {2: -9, 0: 1}, r"process 2 of 4 was ended by SIGKILL; the pod may be short of memory"),
        ({"state": ended(1)}, {0: 1}, r"^Connection closed by peer$"),
        ({"state": ended(3)}, {}, r"failed: node 1: Error, exit code 3; kubetuner-0123: Bad: luck$"),
    ],
)  # fmt: skip
def test_a_node_that_falls_ends_all(
    run: Callable[..., None],
    server: KubernetesServer,
    words: Path,
    container: Json,
    codes: dict[int, int],
    message: str,
) -> None:
    server.warn(NAME, "Bad", "luck")

    def falls() -> None:
        if codes:
            report(words, 0, RuntimeError("Connection closed by peer"))
            report_codes(words, 0, 4, codes)

    server.when_deleted = lambda name: None
    with pytest.raises(TrainingError, match=message):
        run(RUNS, container, meanwhile=falls)
    wait_until(lambda: not server.jobs)


def test_an_evicted_pod(run: Callable[..., None], server: KubernetesServer) -> None:
    def evict() -> None:
        with server.lock:
            server.pods[0]["status"] |= {"phase": "Failed", "reason": "Evicted", "message": "low on ephemeral-storage"}

    with pytest.raises(TrainingError, match="node 0 of 2 was ended: Evicted: low on ephemeral-storage; run again"):
        run(RUNS, RUNS, meanwhile=evict)


def test_a_trainjob_that_fails_without_pods(run: Callable[..., None], server: KubernetesServer) -> None:
    with pytest.raises(TrainingError, match="failed: jobset failed due to a policy"):
        run(meanwhile=lambda: server.end(NAME, "Failed", "jobset failed due to a policy"))


def test_a_trainjob_that_someone_deletes(run: Callable[..., None], server: KubernetesServer) -> None:
    with pytest.raises(TrainingError, match=rf"team/{NAME} was deleted by someone else; run again to resume"):
        run(RUNS, RUNS, meanwhile=lambda: server.delete(NAME))


def test_sigterm_takes_it_away(run: Callable[..., None], server: KubernetesServer) -> None:
    with pytest.raises(TerminatedError, match="told to save a checkpoint"):
        run(RUNS, RUNS, meanwhile=tell_to_stop)
    wait_until(lambda: not server.jobs)


def test_the_same_that_runs_already_is_followed_and_another_replaced(
    cluster: Cluster, server: KubernetesServer, job: Json, words: Path, stop: StopRequest, caplog
) -> None:
    caplog.set_level("INFO")
    submit(cluster, job, words, stop)
    submit(cluster, job, words, stop)
    assert "is there already; following it" in caplog.messages[-1]
    assert sum(line.startswith("POST") for line in server.asked) == 1

    server.end(NAME, "Failed")
    submit(cluster, job, words, stop)
    assert "status" not in server.jobs[NAME]

    settings = TrainJobSettings(workspace_pvc="shared", image="train:2", gpus=8)
    report(words, 0, DatasetError("of the earlier attempt"))
    submit(cluster, make_trainjob(NAME, "asked anew", words, 2, 0, settings), words, stop)
    assert server.jobs[NAME]["spec"]["trainer"]["image"] == "train:2"
    assert not list(words.iterdir())


def test_one_that_is_going_and_its_pods_are_waited_for(
    cluster: Cluster, server: KubernetesServer, job: Json, words: Path, stop: StopRequest
) -> None:
    submit(cluster, job, words, stop)
    saved = threading.Event()
    server.when_deleted = lambda _name: saved.wait(30)
    cluster.delete(NAME)
    server.add_pod("kubetuner-0123", 0, RUNS, phase="Succeeded")
    teller = threading.Timer(0.5, saved.set)
    teller.start()

    submit(cluster, job, words, stop)

    assert saved.is_set()
    assert "deletionTimestamp" not in server.jobs[NAME]["metadata"]


def test_sigterm_while_one_is_going(
    cluster: Cluster, server: KubernetesServer, job: Json, words: Path, stop: StopRequest
) -> None:
    submit(cluster, job, words, stop)
    server.when_deleted = lambda _name: stop.wait(30)
    cluster.delete(NAME)
    threading.Timer(0.3, tell_to_stop).start()
    with pytest.raises(TerminatedError, match="before the TrainJob was submitted"):
        submit(cluster, job, words, stop)
