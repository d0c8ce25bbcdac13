"""The same work for all sides: models, pictures and settings, and how each side is run on them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.cache_encoding import make_pictures
from bench.measure import README
from pipelines.recipes.demo.models import Size, build_pipeline, write_pipeline

HERE = Path(__file__).parent
ROOT = README.parents[1]
PEERS = Path(os.environ.get("PEERS_VENV") or ROOT / ".venv-peers")
EXAMPLES = Path(os.environ.get("DIFFUSERS_EXAMPLES") or PEERS / "diffusers-examples")
BATCH = 4

ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
_COMMON: dict[str, object] = {
    "seed": 42, "train_batch_size": BATCH, "vae_batch_size": BATCH, "num_train_epochs": 0, "optimizer": "torch-adamw",
    "learning_rate": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_grad_norm": 1.0,
    "grad_clip_method": "norm", "mixed_precision": "no", "vae_dtype": "fp32", "gradient_checkpointing": False,
    "caption_dropout_probability": 0.0, "checkpoint_step_interval": 0,
}  # fmt: skip
_MODULES = ("to_k", "to_q", "to_v", "to_out.0")
_LORA = {"lora_rank": 4, "lora_alpha": 4, "lora_dropout": 0.0, "peft_lora_target_modules": _MODULES}
_OF_EXAMPLES = (
    "seed", "train_batch_size", "learning_rate", "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "mixed_precision",
)  # fmt: skip
"""What diffusers' examples call by the same names."""
_THEIRS = {
    "base_model_default_dtype": "fp32", "validation_disable": True, "disable_benchmark": True, "report_to": "none",
    "torch_num_threads": 1, "i_know_what_i_am_doing": True,
}  # fmt: skip
"""Like ours by default: frozen weights as wide as asked for, no pictures after training, no tracker, one thread.

The last key keeps PixArt's ``max_grad_norm`` as it is set.
"""


@dataclass(frozen=True)
class Work:
    """What is trained. Pictures have an edge of which the latents have 16 by 16 or, for Sana, 8 by 8 places."""

    family: str
    model_type: str

    @property
    def edge(self) -> int:
        """Edge of the pictures in pixels."""
        return 256 if self.family == "sana" else 128


WORKS = (
    Work("sdxl", "lora"),
    Work("sdxl", "full"),
    Work("pixart_sigma", "full"),
    Work("sana", "full"),
    Work("sana", "lora"),
)
SCRIPTS = {
    Work("sdxl", "lora"): "train_text_to_image_lora_sdxl.py",
    Work("sdxl", "full"): "train_text_to_image_sdxl.py",
    Work("sana", "lora"): "train_dreambooth_lora_sana.py",
}
"""diffusers' examples; for the other works it has none."""


@dataclass(frozen=True)
class Times:
    """What :mod:`bench.peers.stopwatch` noted.

    Attributes:
        steps: CPU and wall seconds since the process started, after each optimizer step.
        calls: CPU seconds of each watched call.
    """

    steps: Sequence[tuple[float, float]]
    calls: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Side:
    """One side's own folder for one work: nothing is shared, so that neither finds what the other left."""

    work: Work
    folder: Path
    base: Path

    @classmethod
    def prepare(cls, work: Work, size: Size, pictures: int, folder: Path) -> Self:
        """Write the model and the pictures into ``folder``."""
        base = folder / "base"
        write_pipeline(build_pipeline(work.family, size), base)
        make_pictures(folder / "dataset", pictures, work.edge, work.edge)
        return cls(work, folder, base)

    @property
    def pictures(self) -> Path:
        """Where the pictures are; their names are their captions."""
        return self.folder / "dataset-pictures"

    def configure(self, steps: int, own: Mapping[str, object]) -> None:
        """Write ``config.json`` and ``data.json``."""
        config: dict[str, Any] = {
            "model_family": self.work.family, "model_type": self.work.model_type, "max_train_steps": steps,
            "pretrained_model_name_or_path": str(self.base), "data_backend_config": str(self.folder / "data.json"),
            "output_dir": str(self.folder / "out"), **_COMMON, **(_LORA if self.work.model_type == "lora" else {}),
        }  # fmt: skip
        if self.work.family != "sana":
            config["pretrained_vae_model_name_or_path"] = str(self.base)
        data = [
            {
                "id": "pictures", "type": "local", "instance_data_dir": str(self.pictures),
                "caption_strategy": "filename", "resolution": self.work.edge, "resolution_type": "pixel", "crop": True,
                "crop_style": "center", "crop_aspect": "square", "minimum_image_size": 0, "repeats": 100,
                "cache_dir_vae": str(self.folder / "cache/vae"),
            },
            {
                "id": "texts", "type": "local", "dataset_type": "text_embeds", "default": True,
                "cache_dir": str(self.folder / "cache/text"),
            },
        ]  # fmt: skip
        (self.folder / "config.json").write_text(json.dumps({**config, **own}), encoding="utf-8")
        (self.folder / "data.json").write_text(json.dumps(data), encoding="utf-8")

    def run(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Times:
        """Run a script of :mod:`bench.peers.stopwatch`'s kind to its end; everything it prints goes to a log file."""
        times, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
        arguments = [command[0], command[1], str(times), *command[2:]]
        started = {"STOPWATCH_STARTED": str(time.perf_counter())}
        with log.open("w", encoding="utf-8") as said:
            done = subprocess.run(
                arguments, cwd=self.folder, env={**os.environ, **ONE_THREAD, **environment, **started}, check=False,
                stdout=said, stderr=said,
            )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{name} of {self.work} ended with {done.returncode}:\n{log.read_text()[-3000:]}")
        read = json.loads(times.read_text(encoding="utf-8"))
        return Times([(cpu, wall) for cpu, wall in read["steps"]], read["calls"])

    def run_here(self, name: str, *command: str) -> Times:
        """Run a module in our own environment."""
        path = os.pathsep.join(str(folder) for folder in (ROOT / "src", ROOT, PEERS / "diffusers-packages"))
        return self.run(name, [sys.executable, str(HERE / "stopwatch.py"), *command], {"PYTHONPATH": path})


@dataclass(frozen=True)
class Theirs(Side):
    """SimpleTuner, in its own environment."""

    def train(self, steps: int) -> Times:
        """Cache what is not cached yet, and train."""
        python = PEERS / "bin/python"
        if not python.exists():
            raise SystemExit(f"{python} does not exist; make it with bench/peers/setup.sh")
        family = {"pixart_sigma": "pixart"}.get(self.work.family, self.work.family)
        self.configure(steps, {**_THEIRS, "model_family": family})
        environment = {"CONFIG_BACKEND": "json", "CONFIG_PATH": str(self.folder / "config.json"), "PYTHONPATH": ""}
        return self.run("simpletuner", [str(python), str(HERE / "simpletuner_offline.py")], environment)

    def cached_bytes(self) -> tuple[int, int]:
        """Of latents and of texts."""
        return folder_size(self.folder / "cache/vae"), folder_size(self.folder / "cache/text")

    def forget(self) -> None:
        """Drop the caches and what says what is cached."""
        for name in ("cache", "out"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


@dataclass(frozen=True)
class Examples(Side):
    """diffusers' example scripts, in our environment and with the packages that they need besides."""

    @classmethod
    def prepare(cls, work: Work, size: Size, pictures: int, folder: Path) -> Self:
        """Also write the captions, which are the pictures' names, into a table."""
        side = super().prepare(work, size, pictures, folder)
        rows = [{"file_name": path.name, "text": path.stem} for path in sorted(side.pictures.iterdir())]
        table = "".join(f"{json.dumps(row)}\n" for row in rows)
        (side.pictures / "metadata.jsonl").write_text(table, encoding="utf-8")
        return side

    def train(self, steps: int) -> Times:
        """Train; what a script keeps on disk is found again by a run of as many steps."""
        script = EXAMPLES / SCRIPTS[self.work]
        if not script.exists():
            raise SystemExit(f"{script} does not exist; see DIFFUSERS_EXAMPLES in bench/peers/README.md")
        settings: dict[str, object] = {
            **{key: _COMMON[key] for key in _OF_EXAMPLES}, "max_train_steps": steps, "resolution": self.work.edge,
            "pretrained_model_name_or_path": self.base, "caption_column": "text", "checkpointing_steps": 10**6,
            "cache_dir": self.folder / "cache", "output_dir": self.folder / "out",
        }  # fmt: skip
        flags = ["--center_crop"]
        if self.work.model_type == "lora":
            settings["rank"] = _LORA["lora_rank"]
        if self.work.family == "sana":
            modules = ",".join(_MODULES)
            settings |= {"dataset_name": self.pictures, "instance_prompt": "unused", "lora_layers": modules}
            flags.append("--cache_latents")
        else:
            settings["train_data_dir"] = self.pictures
        arguments = [f"--{key}={value}" for key, value in settings.items()]
        return self.run_here("diffusers", "bench.peers.diffusers_offline", str(script), *arguments, *flags)


@dataclass(frozen=True)
class Ours(Side):
    """kubetuner's steps, as its command line runs them."""

    def plan(self, steps: int) -> None:
        """Write the sections and the dataset."""
        self.configure(steps, {})
        self.step("plan", "--in", "config=config.json", "--in", "data=data.json")
        self.step("download_dataset", *self._section)

    def cache(self) -> None:
        """Cache pictures and texts."""
        for name in ("cache_vae", "cache_text_embeds"):
            self.step(name, *self._section, "--in", "dataset=download_dataset")

    def train(self) -> Times:
        """Train on the caches."""
        shutil.rmtree(self.folder / "train", ignore_errors=True)
        caches = ("--in", "latents=cache_vae", "--in", "text_embeds=cache_text_embeds")
        return self.step("train", *self._section, *caches)

    def floor(self, steps: int) -> Times:
        """See :mod:`bench.peers.floor`."""
        return self.run_here("floor", "bench.peers.floor", str(self.folder), str(steps))

    def step(self, name: str, *arguments: str) -> Times:
        """``kubetuner step``; its output lies in the folder called like the step."""
        return self.run_here(name, "kubetuner.cli.main", "step", name, *arguments, "--out", name)

    @property
    def _section(self) -> tuple[str, str]:
        return "--section", "plan/sections.json"


def folder_size(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
