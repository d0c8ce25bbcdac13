"""``kubetuner step``: one step from files, for Argo, shell scripts and a look at one step alone."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click
from pydantic import ValidationError

from kubetuner.artifacts import Artifact
from kubetuner.config.json_file import read_json
from kubetuner.config.sections.base import Section
from kubetuner.errors import InputError

SectionT = TypeVar("SectionT", bound=Section)
SECTIONS_FILE = "sections.json"


@dataclass(frozen=True)
class Request:
    """What the command line asks of a step."""

    section: object
    inputs: Mapping[str, Sequence[Path]]
    out: Path
    shard: int
    num_shards: int

    def parse(self, kind: type[SectionT], key: str) -> SectionT:
        """The step's section: the file's whole content, or its ``key`` when it holds all sections."""
        value = self.section[key] if isinstance(self.section, dict) and key in self.section else self.section
        try:
            return kind.model_validate_json(json.dumps(value))
        except ValidationError as error:
            raise InputError(f"the section is not a {kind.__name__}: {error}") from error

    def one(self, name: str) -> Path:
        """The only input called ``name``."""
        folders = self.many(name)
        if len(folders) != 1:
            raise InputError(f"--in {name}=FOLDER was given {len(folders)} times; expected once.")
        return folders[0]

    def optional(self, name: str) -> Path | None:
        """The input called ``name`` where it was given."""
        return self.one(name) if name in self.inputs else None

    def many(self, name: str) -> Sequence[Path]:
        """All inputs called ``name``, at least one."""
        folders = self.inputs.get(name, ())
        if not folders:
            raise InputError(f"--in {name}=FOLDER is missing.")
        for folder in folders:
            if not folder.exists():
                raise InputError(f"--in {name}={folder}: there is no such folder.")
        return folders


def run_step(
    name: str, section_file: Path | None, inputs: Sequence[str], out: Path, *, shard: int = 0, num_shards: int = 1
) -> None:
    """Run the step called ``name``.

    Raises:
        InputError: The step, its section or an input is wrong.
        StepError: The step failed.
    """
    step = name.replace("-", "_")
    if step != "plan" and step not in _STEPS:
        raise InputError(f"there is no step {name!r}; expected plan, {', '.join(_STEPS)}.")
    if not 0 <= shard < num_shards:
        raise InputError(f"--shard is {shard}; expected 0 to {num_shards - 1}, one less than --num-shards.")
    folders = _by_name(inputs)
    if step == "plan":
        _plan(folders, out)
        return
    if section_file is None:
        raise InputError("--section FILE is missing.")
    artifact = _STEPS[step](Request(read_json(section_file), folders, out, shard, num_shards))
    click.echo(f"{step}: wrote {artifact.fingerprint[:12]} to {out}")


def _by_name(inputs: Sequence[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for item in inputs:
        name, separator, path = item.partition("=")
        if not separator or not path:
            raise InputError(f"--in is {item!r}; expected NAME=FOLDER.")
        found[name.replace("-", "_")].append(Path(path))
    return dict(found)


def _plan(inputs: Mapping[str, Sequence[Path]], out: Path) -> None:
    from kubetuner.cli.inputs import read_inputs
    from kubetuner.steps.plan import make_plan

    if len(inputs.get("config", ())) != 1 or len(inputs.get("data", ())) > 1:
        raise InputError("plan takes --in config=FILE once and --in data=FILE at most once.")
    read = read_inputs(inputs["config"][0], next(iter(inputs.get("data", ())), None), ())
    made = make_plan(read.config, read.data, cwd=Path.cwd(), predict_memory=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / SECTIONS_FILE).write_text(made.sections.to_json() + "\n", encoding="utf-8")
    (out / "plan.md").write_text(made.markdown, encoding="utf-8")
    click.echo(f"plan: wrote {out / SECTIONS_FILE} and plan.md")


def _download_dataset(request: Request) -> Artifact:
    from kubetuner.config.sections.sources import DownloadSection
    from kubetuner.steps.download_dataset import download_dataset

    return download_dataset(request.parse(DownloadSection, "download"), request.out)


def _cache_vae(request: Request) -> Artifact:
    from kubetuner.config.sections.steps import CacheVaeSection
    from kubetuner.steps.cache_vae import cache_vae

    section = request.parse(CacheVaeSection, "cache_vae")
    return cache_vae(section, request.one("dataset"), request.out, shard=request.shard, num_shards=request.num_shards)


def _cache_text_embeds(request: Request) -> Artifact:
    from kubetuner.config.sections.steps import CacheTextSection
    from kubetuner.steps.cache_text_embeds import cache_text_embeds

    section = request.parse(CacheTextSection, "cache_text_embeds")
    return cache_text_embeds(
        section, request.one("dataset"), request.out, shard=request.shard, num_shards=request.num_shards
    )


def _train(request: Request) -> Artifact:
    from kubetuner.config.sections.steps import TrainSection
    from kubetuner.steps.train import train

    section = request.parse(TrainSection, "train")
    caches, dataset = (request.many("latents"), request.many("text_embeds")), request.optional("dataset")
    return train(section, *caches, request.out, dataset=dataset)


def _evaluate(request: Request) -> Artifact:
    from kubetuner.config.sections.steps import EvaluateSection
    from kubetuner.steps.evaluate import evaluate

    section = request.parse(EvaluateSection, "evaluate")
    caches, dataset = (request.many("latents"), request.many("text_embeds")), request.optional("dataset")
    return evaluate(section, request.one("model"), *caches, request.out, dataset=dataset)


def _push_to_hub(request: Request) -> Artifact:
    from kubetuner.config.sections.steps import PushSection
    from kubetuner.steps.push_to_hub import push_to_hub

    section = request.parse(PushSection, "push")
    return push_to_hub(section, request.one("model"), request.one("evaluation"), request.out)


_STEPS: dict[str, Callable[[Request], Artifact]] = {
    "download_dataset": _download_dataset,
    "cache_vae": _cache_vae,
    "cache_text_embeds": _cache_text_embeds,
    "train": _train,
    "evaluate": _evaluate,
    "push_to_hub": _push_to_hub,
}
