"""Which models a run names: their folders, and hashes of exactly those parts that decide each step's result."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kubetuner.config.models import vae_subfolder
from kubetuner.config.sections.adapter import LoraSettings
from kubetuner.config.sections.steps import ModelRef, Sections
from kubetuner.digests import canonical_json, sha256_of
from kubetuner.errors import Problem

_TEXT_FOLDERS = ("text_encoder", "tokenizer")


def resolve_models(sections: Sections, cwd: Path, problems: list[Problem]) -> Sections:
    """``sections`` with folders absolute and hashed; what is wrong with them is appended to ``problems``."""
    models = _Models(cwd, problems)
    given = sections.train.model
    path, local = models.path(given.path, "pretrained_model_name_or_path")
    vae_path, vae_local = models.path(given.vae_path, "pretrained_vae_model_name_or_path")
    judge, judge_local = models.path(sections.evaluate.judge, "pretrained_evaluation_model_name_or_path")
    if local and not (Path(path) / "model_index.json").is_file():
        message = f"{path} holds no model_index.json; expected the folder of a diffusers pipeline."
        models.problems.append(Problem("config.json.pretrained_model_name_or_path", message))
    if local and given.revision:
        message = "has no meaning for a folder, whose contents are hashed; remove it."
        models.problems.append(Problem("config.json.revision", message))
    base = _hashes(Path(path)) if local else {}
    model = ModelRef(
        family=given.family,
        path=path,
        revision=_revision(base) if local else given.revision,
        variant=given.variant,
        vae_path=vae_path,
        vae_revision=_vae_revision(base, vae_path, vae_local),
        text_revision=_text_revision(Path(path), base) if local else "",
    )
    scheduled = model.model_copy(update={"scheduler": given.scheduler})
    lora = _resolve_start(sections.train.lora, models)
    train = sections.train.model_copy(update={"model": scheduled, "lora": lora})
    # A cache step is told of its own part alone, so that Kubeflow repeats it when that part changes and only then.
    whole = {"revision": ""} if local else {}
    vae_model = model.model_copy(update={"text_revision": "", **whole})
    text_model = model.model_copy(update={"vae_path": "", "vae_revision": "", **whole})
    judge_revision = folder_revision(Path(judge)) if judge_local else ""
    evaluate = {"model": scheduled, "judge": judge, "judge_revision": judge_revision}
    return sections.model_copy(
        update={
            "cache_vae": sections.cache_vae.model_copy(update={"model": vae_model}),
            "cache_text_embeds": sections.cache_text_embeds.model_copy(update={"model": text_model}),
            "train": train,
            "evaluate": sections.evaluate.model_copy(update=evaluate),
            "push": sections.push.model_copy(update={"model": scheduled, "training": train.to_json()}),
        }
    )


def folder_revision(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below ``folder``, hidden ones left out."""
    return _revision(_hashes(folder))


@dataclass(frozen=True)
class _Models:
    """Turns names of models into absolute folders where they are folders."""

    cwd: Path
    problems: list[Problem]

    def path(self, name: str, key: str) -> tuple[str, bool]:
        """The name to use, and whether it is a folder."""
        if not name:
            return name, False
        folder = (self.cwd / name).expanduser()
        if folder.is_dir():
            return str(folder.resolve()), True
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            message = f"{folder} is not a folder; expected a folder or a hub id namespace/name."
            self.problems.append(Problem(f"config.json.{key}", message))
        return name, False


def _resolve_start(lora: LoraSettings | None, models: _Models) -> LoraSettings | None:
    """``init_lora`` as an absolute path with the hash of its contents."""
    if lora is None or not lora.init_lora:
        return lora
    path = (models.cwd / lora.init_lora).expanduser()
    if path.is_dir():
        revision = folder_revision(path)
    elif path.is_file():
        revision = sha256_of(path)
    else:
        message = f"{path} does not exist; expected an adapter's folder or its .safetensors file (not a hub id)."
        models.problems.append(Problem("config.json.init_lora", message))
        return lora
    return lora.model_copy(update={"init_lora": str(path.resolve()), "init_lora_revision": revision})


def _hashes(folder: Path) -> dict[str, str]:
    """Name relative to ``folder`` → SHA-256 of each file that is not hidden."""
    named = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    shown = {name: path for name, path in named if not any(part.startswith(".") for part in name.split("/"))}
    return {name: sha256_of(shown[name]) for name in sorted(shown)}


def _revision(hashes: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, content in hashes.items():
        digest.update(f"{len(name)} {name} {content}\n".encode())
    return digest.hexdigest()


def _vae_revision(base: Mapping[str, str], vae_path: str, vae_local: bool) -> str:
    """The hash of the files that the VAE is loaded from; empty when it comes from the hub."""
    if vae_local:
        return folder_revision(Path(vae_path) / vae_subfolder(vae_path))
    if vae_path or not base:
        return ""
    return _revision({name.removeprefix("vae/"): content for name, content in base.items() if name.startswith("vae/")})


def _text_revision(folder: Path, base: Mapping[str, str]) -> str:
    """The hash of tokenizers, text encoders and the pipeline's own settings, such as what an empty prompt is.

    Its list of components and the version that wrote it are left out: they say nothing about texts.
    """
    parts = {name: content for name, content in base.items() if name.startswith(_TEXT_FOLDERS)}
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
    except (OSError, ValueError):
        index = {}
    plain = index.items() if isinstance(index, dict) else ()
    settings = {key: value for key, value in plain if not key.startswith("_") and not isinstance(value, list)}
    return _revision(parts | {"settings": canonical_json(settings)})
