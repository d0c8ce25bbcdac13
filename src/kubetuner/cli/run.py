"""``kubetuner run``: the pipeline on this machine, and what a person wants to see afterwards."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kubetuner.artifacts import (
    ARTIFACT_FILE,
    AnyArtifact,
    DatasetArtifact,
    EvaluationArtifact,
    LatentsArtifact,
    ModelArtifact,
    PublishedArtifact,
    TextEmbedsArtifact,
    read_artifact,
)
from kubetuner.cli.checkout import add_checkout_to_path
from kubetuner.cli.inputs import read_inputs
from kubetuner.config.trainjob import TRAINJOB_VARIABLE
from kubetuner.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from kubetuner.config.load import RunConfig
    from kubetuner.evaluation.summary import RunSummary
    from pipelines.local import LocalRun

_KINDS = (DatasetArtifact, LatentsArtifact, TextEmbedsArtifact, ModelArtifact, EvaluationArtifact, PublishedArtifact)


def run_pipeline(config_file: Path, data_file: Path | None, overrides: Sequence[str], out: Path | None) -> None:
    """Check the input, run every step in a child process, and say what came out.

    Args:
        config_file: ``config.json``.
        data_file: ``multidatabackend.json``; by default the file that ``data_backend_config`` names.
        overrides: ``key=value`` for ``config.json``.
        out: Folder for everything the run makes; by default ``output_dir``.

    Raises:
        InputError: The input is wrong; nothing was run.
        StepError: A step failed.
    """
    from kubetuner.steps.plan import make_plan

    root = add_checkout_to_path()
    inputs = read_inputs(config_file, data_file, overrides)
    plan = make_plan(inputs.config, inputs.data, cwd=Path.cwd())
    if plan.sections.train.num_machines > 1:
        raise InputError(
            f"num_machines is {plan.sections.train.num_machines}, and kubetuner run uses this machine alone; set it to "
            "1 (num_train_processes is for its GPUs), or compile the pipeline and run it on a cluster."
        )
    from pipelines.local import child_environment, run_local

    out = _folder(out, plan.run)
    out.mkdir(parents=True, exist_ok=True)
    environment = child_environment(root, out) | _tracking(plan.run) | {TRAINJOB_VARIABLE: ""}
    arguments = {"config": inputs.config, "data_backend_config": inputs.data, "num_shards": 1}
    with _tracked_as_one(environment):
        done = run_local(_load_pipeline, arguments, out, environment, sys.stdout)
    _finish(done, out, environment, f"{plan.summary['max_train_steps']} steps planned, nothing wrong with the input")


def _folder(given: Path | None, run: "RunConfig") -> Path:
    if given is None and not run.output_dir:
        raise InputError(
            "the folder of the run is missing; give it with --out FOLDER, or as output_dir in config.json."
        )
    return (given or Path(run.output_dir)).resolve()


def _tracking(run: "RunConfig") -> dict[str, str]:
    """``report_to``, ``tracker_project_name`` and ``tracker_run_name``: where the steps log to."""
    chosen = {"MLFLOW_EXPERIMENT_NAME": run.tracker_project_name, "KUBETUNER_RUN_NAME": run.tracker_run_name}
    off = {"MLFLOW_TRACKING_URI": ""} if run.report_to == "none" else {}
    return {name: value for name, value in chosen.items() if value} | off


@contextlib.contextmanager
def _tracked_as_one(environment: Mapping[str, str]) -> Iterator[None]:
    """End the MLflow run that the steps' runs belong to, as they ended."""
    from kubetuner.tracking import finish_parent
    from pipelines.local import in_environment

    try:
        yield
    except BaseException:
        with in_environment(environment):
            finish_parent("FAILED")
        raise
    with in_environment(environment):
        finish_parent("FINISHED")


def _load_pipeline() -> object:
    from pipelines.finetune import finetune

    return finetune


def _finish(done: "LocalRun", out: Path, environment: Mapping[str, str], planned: str) -> None:
    from kubetuner.evaluation.summary import write_summary
    from pipelines.local_log import HELPERS

    model, evaluation, published = (done.folders[name] for name in ("model", "evaluation", "published"))
    pushed = read_artifact(published, PublishedArtifact)
    report = out / "report.html"
    shutil.copyfile(evaluation / "report.html", report)
    if not pushed.commit:
        _replace_folder(published / "hub" if (published / "hub").is_dir() else published, out / "hub")
    tasks = {name: task for name, task in done.tasks.items() if name not in HELPERS}
    summary = write_summary(
        out,
        model=model,
        evaluation=evaluation,
        seconds={name: task.seconds for name, task in tasks.items()},
        cache_hits=[name for name, task in tasks.items() if task.cached],
        pushed_to=pushed.url if pushed.commit else str(out / "hub"),
    )
    rows = [
        (name, "-", "cache hit")
        if task.cached
        else (name, f"{task.seconds:.1f}", planned if name == "plan" else _made(done.artifacts, name))
        for name, task in tasks.items()
    ]
    click.echo("\n" + _table(("step", "seconds", "what came out"), rows) + "\n")
    click.echo(f"model      {summary.model_path}")
    click.echo(f"published  {pushed.url if pushed.commit else out / 'hub'}")
    click.echo(f"report     open {_near(report)} in a browser")
    if uri := environment["MLFLOW_TRACKING_URI"]:
        server = uri.startswith("http")
        click.echo(f"runs       {'open ' + uri if server else 'mlflow ui --backend-store-uri ' + uri}")
    if hits := summary.cache_hits:
        click.echo(f"cache      {len(hits)} of {len(tasks)} steps were hits: {', '.join(hits)}")
    click.echo(f"{_losses(summary)} in {summary.steps} steps; report: {_near(report)}")


def _losses(summary: "RunSummary") -> str:
    train, evaluated = summary.train_loss, summary.eval_loss
    text = f"loss {train.first:.4f} -> {train.last:.4f}"
    if evaluated.before is not None and evaluated.after is not None:
        text += f" (held out: {evaluated.before:.4f} -> {evaluated.after:.4f})"
    return text


def _replace_folder(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def _near(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _made(artifacts: Path | None, step: str) -> str:
    if artifacts is None:
        return ""
    folders = sorted(artifacts.rglob(f"{step.replace('_', '-')}/*/{ARTIFACT_FILE}"))
    return "; ".join(filter(None, (_describe(file.parent) for file in folders)))


def _describe(folder: Path) -> str:
    for kind in _KINDS:
        try:
            artifact = read_artifact(folder, kind)
        except ArtifactError:
            continue
        return _in_words(artifact)  # type: ignore[arg-type]
    return ""


def _in_words(artifact: AnyArtifact) -> str:
    match artifact:
        case DatasetArtifact():
            return f"{artifact.num_samples} pictures" + _skipped(len(artifact.skipped))
        case LatentsArtifact():
            new = f"{artifact.num_samples} latents ({artifact.encoded} encoded, {artifact.reused} reused)"
            return new + _skipped(len(artifact.skipped))
        case TextEmbedsArtifact():
            return f"{artifact.num_texts} texts ({artifact.encoded} encoded, {artifact.reused} reused)"
        case ModelArtifact():
            loss = f"{artifact.first_loss:.4f} -> {artifact.last_loss:.4f}"
            return f"{artifact.model_type} {artifact.family}, {artifact.steps} steps, loss {loss}"
        case EvaluationArtifact():
            before, after = artifact.eval_loss_before, artifact.eval_loss_after
            losses = f", eval loss {before:.4f} -> {after:.4f}" if before is not None and after is not None else ""
            return f"{len(artifact.images)} pictures before and after{losses}"
        case PublishedArtifact():
            return artifact.url if artifact.commit else "hub folder, not uploaded"


def _skipped(count: int) -> str:
    return f", {count} skipped" if count else ""


def _table(head: tuple[str, str, str], rows: Sequence[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in (head, *rows))
