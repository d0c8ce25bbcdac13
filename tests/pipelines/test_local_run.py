"""The local wrapper against real kfp components and a real kfp.local."""

import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kfp import dsl

from pipelines.local import TaskFailedError, child_environment, run_local, source_image
from pipelines.local_log import cause_of

ROOT = Path(__file__).parents[2]

# kfp 2.17 warns about its own defaults; nothing of ours to change.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:kfp", "ignore::FutureWarning:kfp")


@dsl.component(base_image="local/python-test", install_kfp_package=False)
def numbers(count: int) -> list:
    return list(range(count))


@dsl.component(base_image="local/python-test", install_kfp_package=False)
def write(config: dict, shard: int, folder: dsl.Output[dsl.Dataset]):
    import os
    from pathlib import Path

    import kubetuner

    Path(folder.path).mkdir(parents=True)
    (Path(folder.path) / "text").write_text(f"{config['text']} {shard} {os.environ['KUBETUNER_STORE']}")
    print(f"wrote for {kubetuner.__version__}")  # noqa: T201


@dsl.component(base_image="local/python-test", install_kfp_package=False)
def gather(
    folders: dsl.Input[list[dsl.Dataset]], fail: bool, model: dsl.Output[dsl.Model], metrics: dsl.Output[dsl.Metrics]
):
    from pathlib import Path

    if fail:
        raise ValueError("the real reason")
    Path(model.path).write_text("".join((Path(f.path) / "text").read_text() for f in folders))
    metrics.log_metric("count", len(folders))
    Path(metrics.path).write_text("{}")


@dsl.pipeline(name="fake")
def fake(config: dict, fail: bool = False) -> dsl.Model:
    with dsl.ParallelFor(numbers(count=1).output) as shard:
        written = write(config=config, shard=shard)
        written.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit("1")
    gathered = gather(folders=dsl.Collected(written.outputs["folder"]), fail=fail)
    gathered.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit("1")
    return gathered.outputs["model"]


def run(out: Path, **arguments: object):
    terminal = io.StringIO()
    made = run_local(lambda: fake, arguments, out, child_environment(ROOT, out.resolve()), terminal)
    return made, terminal.getvalue()


def test_a_run_says_what_ran_and_hides_kfps_noise(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)
    before = print, sys.stdout, logging.getLogger().handlers[:], logging.getLogger().level
    made, shown = run(tmp_path, config={"text": "it's {a} 'caption' }", "deep": {"list": [1, {"x": "}"}]}})
    assert made.folders["Output"].read_text() == f"it's {{a}} 'caption' }} 0 {tmp_path / 'store'}"
    assert list(made.tasks) == ["numbers", "write", "gather"]
    assert all(task.seconds > 0 and not task.cached for task in made.tasks.values())
    assert "wrote for" in shown
    for noise in ("\x1b", "executor_input", "KFP Executor", "Streamed", "----", '"parameterValues"', "Warning"):
        assert noise not in shown, shown
    assert (print, sys.stdout, logging.getLogger().handlers[:], logging.getLogger().level) == before


def test_a_second_run_is_served_from_the_cache(tmp_path):
    run(tmp_path, config={"text": "same"})
    made, shown = run(tmp_path, config={"text": "same"})
    assert {name: task.cached for name, task in made.tasks.items()} == {"numbers": True, "write": True, "gather": True}
    assert "cache hit" in shown
    assert made.folders["Output"].is_file()


def test_a_failure_names_the_step_and_its_cause(tmp_path):
    with pytest.raises(TaskFailedError) as caught:
        run(tmp_path, config={"text": "x"}, fail=True)
    assert caught.value.step == "gather"
    assert "ValueError: the real reason" in str(caught.value)
    assert "the real reason" in caught.value.log.read_text()
    assert "\x1b" not in str(caught.value)
    assert str(caught.value).startswith("gather failed: ValueError: the real reason\n")


@dsl.component(base_image="local/python-test", install_kfp_package=False)
def encode(latents: dsl.Output[dsl.Dataset]):
    from pathlib import Path

    import torch

    from kubetuner.artifacts import LatentsArtifact, write_artifact
    from kubetuner.steps.boundary import facts
    from kubetuner.store import resolve_store

    shard = resolve_store(Path(latents.path)).write_shard("latents", {"a" * 64: {"latents": torch.ones(4)}})
    made = LatentsArtifact(fingerprint="f", num_samples=1, encoded=1, reused=0, tensors={}, shards=(shard,))
    Path(latents.path).mkdir(parents=True)
    write_artifact(Path(latents.path), made)
    latents.metadata.update(facts(made))


@dsl.component(base_image="local/python-test", install_kfp_package=False)
def learn(latents: dsl.Input[dsl.Dataset], rate: float):
    from pathlib import Path

    from kubetuner.artifacts import LatentsArtifact, read_artifact
    from kubetuner.store import resolve_store

    folder = Path(latents.path)
    resolve_store(folder).lease(read_artifact(folder, LatentsArtifact).shards[0].file)


@dsl.pipeline(name="fragile")
def fragile(rate: float):
    learn(latents=encode().outputs["latents"], rate=rate)


@pytest.mark.parametrize("fault", ["rotten", "rotten behind the mark", "removed"])
def test_shards_that_are_damaged_or_gone_are_made_anew_by_the_next_run(tmp_path, monkeypatch, fault):
    monkeypatch.delenv("KUBETUNER_STORE", raising=False)

    def go(rate: float):
        environment = child_environment(ROOT, tmp_path.resolve())
        return run_local(lambda: fragile, {"rate": rate}, tmp_path, environment, io.StringIO()).tasks

    go(1.0)
    (shard,) = (tmp_path / "store/shards").iterdir()
    before = shard.stat()
    if fault == "removed":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    if fault == "rotten behind the mark":
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        TaskFailedError, match=r"(?s)learn failed: shard .*latents are missing or damaged\. Start the run"
    ):
        go(2.0)
    tasks = go(2.0)
    assert {name: task.cached for name, task in tasks.items()} == {"encode": False, "learn": False}
    assert {name: task.cached for name, task in go(2.0).items()} == {"encode": True, "learn": True}


WAITING = """
import io, sys
from pathlib import Path
from kfp import dsl
from pipelines.local import child_environment, run_local

@dsl.component(base_image="local/python-test", install_kfp_package=False)
def wait(folder: str):
    import signal, sys, time
    from pathlib import Path
    def save(*_args):
        Path(folder, "saved").touch()
        sys.exit(1)
    signal.signal(signal.SIGTERM, save)
    print("waiting", flush=True)
    time.sleep(300)

@dsl.pipeline(name="waiting")
def waiting(folder: str):
    wait(folder=folder)

out = Path(sys.argv[1])
run_local(lambda: waiting, {"folder": str(out)}, out, child_environment(Path.cwd(), out))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_stops_its_steps(tmp_path, number):
    (tmp_path / "waiting.py").write_text(WAITING)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, str(tmp_path / "waiting.py"), str(tmp_path)]

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and so their children, ignore it

    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=heed
    ) as process:
        assert process.stdout is not None
        assert any("waiting" in line and "started" not in line for line in process.stdout)
        process.send_signal(number)
        process.stdout.read()  # ends when no step holds the other end
    assert process.returncode != 0
    assert (tmp_path / "saved").exists()


def test_an_error_of_ours_is_shown_without_frames():
    tail = [
        "before",
        "Traceback (most recent call last):",
        "  File x",
        "kubetuner.errors.DatasetError: too few",
        "  - a",
    ]
    assert cause_of(tail) == ("too few\n  - a", [])
    assert cause_of([*tail[:3], "kubetuner.store.DamagedShardError: it is damaged"]) == ("it is damaged", [])
    assert cause_of([*tail[:3], "ValueError: it is damaged"]) == ("ValueError: it is damaged", ["  File x"])
    assert cause_of(["Killed"]) == ("", ["Killed"])


def test_the_image_changes_with_the_code(tmp_path):
    (tmp_path / "src/kubetuner").mkdir(parents=True)
    file = tmp_path / "src/kubetuner/a.py"
    file.write_text("1")
    first = source_image(tmp_path)
    file.write_text("2")
    assert source_image(tmp_path) != first
