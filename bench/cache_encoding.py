"""The cache steps beside bare loops over the encoder.

Two bare loops, one thread each, throw their results away: the encoder alone on batches that are ready, and the same
with what any way of caching must do first, which is decoding the pictures or preparing the texts. Ours does all that
and keeps keys, checksums, shards and rows. Unit models cost next to nothing, so everything around them shows; ``mid``
ones are still far cheaper than real ones.

Run ``PYTHONPATH=src:. python -m bench.cache_encoding [--sizes unit,mid] [--rounds 3]``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("KUBETUNER_STORE", None)

import argparse
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from bench.measure import alternate, in_child, report, table
from kubetuner.artifacts import Sample, read_rows
from kubetuner.config.sections.geometry import DatasetGeometry, Geometry
from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.config.sections.steps import CacheTextSection, CacheVaeSection, ModelRef
from kubetuner.data.geometry import Placement
from kubetuner.data.pictures import open_picture, to_pixels
from kubetuner.families import load_family
from kubetuner.families.text import TextEncoder
from kubetuner.steps.cache_text_embeds import BATCHES_AT_ONCE, cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from pipelines.recipes.demo.autoencoders import dc_autoencoder, kl_autoencoder
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

FAMILIES = ("pixart_sigma", "sdxl", "sana")
CPU = torch.device("cpu")
EDGE = 128
BATCH = 16
PICTURES = 4
FIRST = 16
COUNTS = {"unit": {"cache_vae": 128, "cache_text_embeds": 512}, "mid": {"cache_vae": 48, "cache_text_embeds": 96}}
# glibc gives large blocks back to the kernel at once and gets them again, which costs a bare loop up to half its time,
# or nothing, as chance has laid out the heap. So both sides keep theirs.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="unit,mid")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    for size in arguments.sizes.split(","):
        for family in FAMILIES:
            call = f"print(json.dumps(throughput({family!r}, {size!r}, {arguments.rounds})))"
            rows += json.loads(in_child("bench.cache_encoding", call, MALLOC))
    head = ["model", "family", "what", "encoder alone", "with decoding", "our step", "of alone", "of decoding"]
    note = (
        "\n\nPictures or texts a CPU second, medians of alternating rounds. *Encoder alone*: the models' calls on "
        "ready batches, of an autoencoder in the faster of both memory layouts. *With decoding*: the same after "
        "Pillow's decoding of the same files, or the family's cleaning and tokenizing. *Our step* also checks, hashes, "
        "keys, shards and writes. Unit: "
        f"{COUNTS['unit']['cache_vae']} pictures and {COUNTS['unit']['cache_text_embeds']} captions; mid: "
        f"{COUNTS['mid']['cache_vae']} and {COUNTS['mid']['cache_text_embeds']}; all of {EDGE} px. Loading is counted "
        f"nowhere. Batches of {PICTURES} pictures or {BATCH} texts everywhere."
    )
    report("Cache: encoding", table(head, rows) + note)


def throughput(name: str, size: str, rounds: int) -> list[list[str]]:
    """Two rows of the table."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        counts = COUNTS[size]
        write_models(name, size, scratch / "base")
        for dataset, count, edge in (
            ("cache_vae", counts["cache_vae"], EDGE), ("cache_text_embeds", counts["cache_text_embeds"], 16),
            ("start", FIRST, EDGE),
        ):  # fmt: skip
            make_dataset(scratch / dataset, count, edge)
        ref = ModelRef.model_validate({"family": name, "path": str(scratch / "base")})
        works = bare_pictures(ref, scratch / "cache_vae") | bare_texts(ref, counts["cache_text_embeds"])
        for kind in counts:
            works |= {f"{kind} whole": partial(run_afresh, kind, ref, scratch / kind)}
            works |= {f"{kind} start": partial(run_afresh, kind, ref, scratch / "start")}
        alternate(1, works)
        seconds = alternate(rounds, works)
    seconds["cache_vae alone"] = min(seconds["cache_vae alone"], seconds["cache_vae alone plain"])
    rows = []
    for kind, what in (("cache_vae", "pictures"), ("cache_text_embeds", "texts")):
        alone, prepared = (counts[kind] / seconds[f"{kind} {loop}"] for loop in ("alone", "prepared"))
        # The step on a few samples is loading and little else.
        ours = (counts[kind] - FIRST) / (seconds[f"{kind} whole"] - seconds[f"{kind} start"])
        rates = [f"{rate:,.0f}" for rate in (alone, prepared, ours)]
        rows.append([size, name, what, *rates, f"{ours / alone:.0%}", f"{ours / prepared:.0%}"])
    return rows


def write_models(name: str, size: str, folder: Path) -> None:
    """A unit pipeline; for ``mid`` with a larger autoencoder and larger text encoders."""
    pipeline = build_pipeline(name, "unit")
    if size == "mid":
        torch.manual_seed(0)
        vae = dc_autoencoder((16, 32, 64, 64), 4) if name == "sana" else kl_autoencoder((16, 32, 64, 64), 4)
        pipeline.register_modules(vae=vae)
        for part in ("text_encoder", "text_encoder_2"):
            small = getattr(pipeline, part, None)
            if small is not None:
                pipeline.register_modules(**{part: larger(small)})
    write_pipeline(pipeline, folder)


def larger(encoder: Any) -> nn.Module:
    """A text encoder of the same kind, six layers of width 256."""
    config = encoder.config
    sizes: dict[str, int] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    if config.model_type == "t5":
        sizes = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 6, "num_heads": 4}
    elif config.model_type == "gemma2":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64}
    else:
        sizes |= {"num_attention_heads": 4, "projection_dim": 256}
    others = {key: value for key, value in config.to_dict().items() if key != "layer_types"}  # One for each layer.
    made: nn.Module = type(encoder)(type(config).from_dict(others | sizes))
    return made.eval()


def bare_pictures(ref: ModelRef, dataset: Path) -> dict[str, Callable[[], object]]:
    """Both bare loops over the VAE."""
    family = load_family(ref.family)
    vae = family.load_vae(ref, CPU)
    plain: Any = family.load_vae(ref, CPU).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    noise = torch.randn(PICTURES, *family.latent_shape(vae, EDGE, EDGE))
    files = [dataset / sample.file for sample in read_rows(dataset, "samples.jsonl", Sample)]
    groups = [files[start : start + PICTURES] for start in range(0, len(files), PICTURES)]
    whole = Placement((EDGE, EDGE), (0, 0), (EDGE, EDGE), "1.0")
    pixels = torch.randn(PICTURES, 3, EDGE, EDGE)
    last = pixels.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def alone_last() -> None:
        for _ in groups:
            family.encode_pixels(vae, last, noise)

    @torch.inference_mode()
    def alone_plain() -> None:
        for _ in groups:
            plain.encode(pixels)

    @torch.inference_mode()
    def prepared() -> None:
        for group in groups:
            ready = torch.stack([to_pixels(open_picture(file), whole) for file in group])
            family.encode_pixels(vae, ready, noise)

    return {"cache_vae alone": alone_last, "cache_vae alone plain": alone_plain, "cache_vae prepared": prepared}


def bare_texts(ref: ModelRef, count: int) -> dict[str, Callable[[], object]]:
    """Both bare loops over the text encoders; the ready batches are those that the family itself makes."""
    family = load_family(ref.family)
    encoders = family.load_text_encoders(ref, CPU)
    section = CacheTextSection(model=ref, text_encoder_batch_size=BATCH)
    texts = sorted((caption(index) for index in range(count)), key=len)

    @torch.inference_mode()
    def prepared() -> None:
        for start in range(0, len(texts), BATCHES_AT_ONCE * BATCH):
            family.encode_texts(encoders, texts[start : start + BATCHES_AT_ONCE * BATCH], section)

    calls = recorded(encoders, prepared)

    @torch.inference_mode()
    def alone() -> None:
        for model, arguments, named in calls:
            model(*arguments, **named)

    return {"cache_text_embeds alone": alone, "cache_text_embeds prepared": prepared}


def recorded(encoders: Any, work: Callable[[], object]) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """The calls that ``work`` makes of the text models."""
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((model, arguments, named))

    parts = [encoders] if isinstance(encoders, TextEncoder) else [encoders.first, encoders.second]
    hooks = [part.model.register_forward_pre_hook(note, with_kwargs=True) for part in parts]
    work()
    for hook in hooks:
        hook.remove()
    return calls


def run_afresh(kind: str, ref: ModelRef, dataset: Path) -> None:
    """Run a cache step on an empty store."""
    out = dataset.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    run_step(kind, ref, dataset, out, EDGE)


def run_step(kind: str, ref: ModelRef, dataset: Path, out: Path, edge: int) -> None:
    """Run one cache step; pictures are ``edge`` pixels wide and high."""
    if kind == "cache_vae":
        geometry = Geometry(
            resolution=edge, resolution_type="pixel", aspect_bucket_alignment=8, crop=True, crop_style="center"
        )
        datasets = (DatasetGeometry(id="bench", geometry=geometry),)
        cache_vae(CacheVaeSection(model=ref, datasets=datasets, dtype="bf16", vae_batch_size=PICTURES), dataset, out)
    else:
        cache_text_embeds(CacheTextSection(model=ref, text_encoder_batch_size=BATCH, dtype="bf16"), dataset, out)


def make_dataset(folder: Path, count: int, edge: int) -> None:
    """A dataset artifact of ``count`` different pictures."""
    make_pictures(folder, count, edge)
    download(folder)


def make_pictures(folder: Path, count: int, edge: int) -> None:
    """Noise that is quick to draw: one large picture, cut at different places."""
    pictures = folder.parent / f"{folder.name}-pictures"
    pictures.mkdir(parents=True)
    large = Image.effect_noise((edge + 400, edge + 400), 60).convert("RGB")
    for index in range(count):
        left, top = index % 400, index // 400
        large.crop((left, top, left + edge, top + edge)).save(pictures / f"{caption(index)}.png", compress_level=1)


def download(folder: Path) -> None:
    """The step that makes the dataset artifact."""
    source = DatasetSource(id="bench", instance_data_dir=str(folder.parent / f"{folder.name}-pictures"))
    download_dataset(DownloadSection(datasets=(source,)), folder)


def caption(index: int) -> str:
    """About a dozen words."""
    return f"a picture number {index} with {index % 7} red rings on a white background and little else"


if __name__ == "__main__":
    main()
