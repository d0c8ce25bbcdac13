"""Run a pipeline on this machine: ``kfp.local`` with its rough edges taken off.

Everything lands below one folder: ``artifacts/`` and ``cache/`` (kfp's), ``store/`` (encoded samples),
``checkpoints/``, ``mlflow.db`` and ``mlartifacts/``, ``logs/``. Each step is a child process with the same working
directory and the checkout on its path. Steps run one after the other; ParallelFor runs two iterations at a time, which
on one machine only makes them share its device, so ``kubetuner run`` uses one shard.
"""

import builtins
import contextlib
import hashlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kubetuner.errors import StepError
from pipelines.local_cache import forget_broken
from pipelines.local_log import ANSI, RootHandler, RunLog, TaskLog, cause_of

SHOWN_LINES = 12
# A step that is stopped saves a checkpoint; pods get 30 s for that by default.
GRACE_SECONDS = 30


class TaskFailedError(StepError):
    """A step of a local run failed.

    Attributes:
        step: Its name.
        log: File with everything it printed.
    """

    def __init__(self, step: str, lines: list[str], log: Path, advice: str = "") -> None:
        self.step, self.log = step, log
        reason, frames = cause_of(lines)
        shown = "".join(f"\n    {line}" for line in frames[-SHOWN_LINES:])
        super().__init__(
            f"{step} failed: {reason or 'it ended without saying why'}{shown}{advice}\nEverything it printed: {log}"
        )


@dataclass(frozen=True)
class LocalRun:
    """A finished local run.

    Attributes:
        folders: The pipeline's output artifacts by name.
        tasks: What each step did, in the order they ran.
        artifacts: Folder below which this run's artifacts lie.
    """

    folders: dict[str, Path]
    tasks: dict[str, TaskLog]
    artifacts: Path | None


def source_image(root: Path) -> str:
    """The image name that stands for this checkout: it changes when the code does, and with it kfp's cache key."""
    digest = hashlib.sha256()
    for folder in ("src/kubetuner", "components"):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"local/python-kubetuner:{digest.hexdigest()[:12]}"


def child_environment(root: Path, out: Path) -> dict[str, str]:
    """What the steps find in their environment; names that the caller's environment decides are left alone."""
    image = source_image(root)
    path = os.pathsep.join([str(root / "src"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {
        "KUBETUNER_BASE_IMAGE": image,
        "KUBETUNER_TRAIN_IMAGE": image,
        "KUBETUNER_RUN_ID": f"local-{uuid.uuid4().hex[:12]}",
        "PYTHONPATH": path,
    }
    defaults = {
        "KUBETUNER_STORE": str(out / "store"),
        "KUBETUNER_STORE_CACHE": str(out / "store-cache"),
        "KUBETUNER_CHECKPOINTS": str(out / "checkpoints"),
        "KUBETUNER_MLFLOW_ARTIFACTS": str(out / "mlartifacts"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{out / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return {**defaults, **{name: os.environ[name] for name in defaults if name in os.environ}, **fixed}


def run_local(
    load_pipeline: Callable[[], Any],
    arguments: Mapping[str, object],
    out: Path,
    environment: Mapping[str, str],
    terminal: TextIO | None = None,
) -> LocalRun:
    """Run a pipeline in child processes of this one.

    Args:
        load_pipeline: Imports and returns the pipeline; called once ``environment`` is set, because components read
            their image's name when they are imported.
        arguments: The pipeline's arguments.
        out: Folder for everything the run leaves behind.
        environment: See :func:`child_environment`.
        terminal: Where progress goes; standard output when ``None``.

    Raises:
        TaskFailedError: A step failed; the message ends with the step's last lines.
        KeyboardInterrupt: SIGINT or SIGTERM arrived; the running steps have been stopped.
    """
    out = out.resolve()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    log_file = out / "logs" / f"{stamp}-{uuid.uuid4().hex[:6]}.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    artifacts = out / "artifacts"
    before = set(artifacts.iterdir()) if artifacts.is_dir() else set()
    with log_file.open("w", encoding="utf-8") as full:
        log = RunLog(terminal or sys.stdout, full)
        with in_environment(environment), _scratch() as scratch:
            pipeline = load_pipeline()
            _start(out, scratch / "workspace")
            try:
                with _captured(log), _stopped_together():
                    outputs = pipeline(**arguments).outputs
            except RuntimeError as error:
                raise _failure(log, log_file, error, _advice(out, environment)) from error
    new = sorted(set(artifacts.iterdir()) - before) if artifacts.is_dir() else []
    folders = {name: Path(value.path) for name, value in outputs.items() if hasattr(value, "path")}
    return LocalRun(folders, log.tasks, new[-1] if new else None)


def _start(out: Path, workspace: Path) -> None:
    from kfp import local

    workspace.mkdir(parents=True)
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(out / "artifacts"),
        workspace_root=str(workspace),
        enable_caching=True,
        cache_root=str(out / "cache"),
    )


def _failure(log: RunLog, log_file: Path, error: RuntimeError, advice: str) -> StepError:
    for step, task in log.tasks.items():
        if task.failed:
            return TaskFailedError(step, list(task.tail), log_file, advice)
    for step, task in reversed(log.tasks.items()):
        if not task.cached and not task.ended:
            return TaskFailedError(step, [*task.tail, ANSI.sub("", str(error))], log_file, advice)
    reason = "; ".join(log.faults) or ANSI.sub("", str(error))
    return StepError(f"The pipeline failed: {reason} (log: {log_file})")


def _advice(out: Path, environment: Mapping[str, str]) -> str:
    """What to do about cached steps that can no longer be used."""
    broken = forget_broken(out / "cache", environment["KUBETUNER_STORE"])
    named = " and ".join(broken)
    return (
        f"\nShards of {named} are missing or damaged. Start the run again: it encodes their samples." if broken else ""
    )


@contextlib.contextmanager
def _captured(log: RunLog) -> Iterator[None]:
    """Send kfp's prints and log records to ``log``; kfp leaves print and the root logger changed, so put them back."""
    root, original_print, stdout = logging.getLogger(), builtins.print, sys.stdout
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [RootHandler(log)]
    root.setLevel(logging.INFO)
    sys.stdout = log
    try:
        with warnings.catch_warnings():
            # Both say that a local run is not a cluster: the image and its GPU limits are not used here.
            warnings.filterwarnings("ignore", message="You may be attemping to run a task", category=RuntimeWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"kfp\.local")
            yield
    finally:
        sys.stdout = stdout
        builtins.print = original_print
        root.handlers[:] = handlers
        root.setLevel(level)


@contextlib.contextmanager
def _stopped_together() -> Iterator[None]:
    """Stop the running steps when this process is told to stop; kfp would leave them running on their own."""
    import psutil

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        children = psutil.Process().children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        for child in psutil.wait_procs(children, timeout=GRACE_SECONDS)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def in_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process, and put them back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder for kfp's workspace and for the folder that it leaves behind for every task."""
    folder = Path(tempfile.mkdtemp(prefix="kubetuner-"))
    try:
        with in_environment({"TMPDIR": str(folder)}):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
