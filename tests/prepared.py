"""What ``kubetuner step train`` needs, made by the steps before it."""

from collections.abc import Mapping
from pathlib import Path

from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from kubetuner.steps.plan import make_plan


def train_arguments(folder: Path, config: Mapping[str, object], pictures: str) -> list[str]:
    """The command without ``--out``, over caches of 64 px of the folder ``pictures`` in ``folder``."""
    data = [{"id": "a", "instance_data_dir": pictures, "resolution": 64, "resolution_type": "pixel"}]
    sections = make_plan(config, data, cwd=folder).sections
    (folder / "sections.json").write_text(sections.to_json())
    download_dataset(sections.download, folder / "dataset")
    cache_vae(sections.cache_vae, folder / "dataset", folder / "latents")
    cache_text_embeds(sections.cache_text_embeds, folder / "dataset", folder / "texts")
    return [
        "step", "train", "--section", f"{folder}/sections.json", "--in", f"latents={folder}/latents",
        "--in", f"text_embeds={folder}/texts",
    ]  # fmt: skip
