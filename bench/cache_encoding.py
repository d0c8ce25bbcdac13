"""The cache steps beside bare loops over the encoder.

Two bare loops, one thread each, throw their results away: the encoder alone on batches that are ready, and the same
with what any way of caching must do first, which is decoding the pictures or preparing the texts. Ours does all that
and keeps keys, checksums, shards and rows; its encoder has one thread too, and decoding and writing go on beside it, as
beside a GPU. Unit models cost next to nothing, so everything around them shows; ``mid`` ones, of which a call takes a
few milliseconds a picture, are still far cheaper than real ones. ``wide`` ones are as wide as the published, on crops
of larger JPEG files: they want a machine without other users, and elsewhere ``bench.wide_encoding`` tells more.

Run ``PYTHONPATH=src:. python -m bench.cache_encoding [--sizes unit,mid[,wide]] [--families …] [--rounds 3]``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("KUBETUNER_STORE", None)

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from bench.measure import Spent, alternate, in_child, report, table
from bench.wide_encoders import autoencoder as wide_autoencoder
from bench.wide_encoders import cuts, text_sizes
from kubetuner.artifacts import Sample, read_rows
from kubetuner.config.sections.geometry import DatasetGeometry, Geometry
from kubetuner.config.sections.sources import DatasetSource, DownloadSection
from kubetuner.config.sections.steps import CacheTextSection, CacheVaeSection, ModelRef
from kubetuner.data.geometry import Placement, place
from kubetuner.data.pictures import open_picture, to_pixels
from kubetuner.families import load_family
from kubetuner.families.text import TextEncoder
from kubetuner.families.text_encoding import encode_texts
from kubetuner.steps.cache_text_embeds import cache_text_embeds
from kubetuner.steps.cache_vae import cache_vae
from kubetuner.steps.download_dataset import download_dataset
from pipelines.recipes.demo.autoencoders import dc_autoencoder, kl_autoencoder
from pipelines.recipes.demo.models import build_pipeline, write_pipeline

KINDS = {"cache_vae": "pictures", "cache_text_embeds": "texts"}
FAMILIES = ("pixart_sigma", "sdxl", "sana")
CPU = torch.device("cpu")
BATCH = 16


@dataclass(frozen=True)
class Scale:
    """How much is encoded with models of one size.

    Attributes:
        counts: Samples by step.
        first: Of these so many are encoded apart, to know what starting costs.
        batch: Pictures encoded at once.
        edge: Pixels of the square that is encoded.
        file: (width, height) of the picture files, and their format.
    """

    counts: dict[str, int]
    first: dict[str, int]
    batch: int
    edge: int
    file: tuple[int, int, str]


SCALES = {
    "unit": Scale(
        {"cache_vae": 512, "cache_text_embeds": 2048}, {"cache_vae": 16, "cache_text_embeds": 16},
        4, 128, (128, 128, "png"),
    ),
    "mid": Scale(
        {"cache_vae": 256, "cache_text_embeds": 512}, {"cache_vae": 16, "cache_text_embeds": 16},
        4, 128, (128, 128, "png"),
    ),
    "wide": Scale(
        {"cache_vae": 3, "cache_text_embeds": 32}, {"cache_vae": 1, "cache_text_embeds": 16},
        1, 512, (2048, 1536, "jpg"),
    ),
}  # fmt: skip
# Sana's autoencoder makes one latent of 32x32 pixels, the others of 8x8.
SANA_SQUARE = (256, 256, "png")
# glibc gives large blocks back to the kernel at once and gets them again, which costs a bare loop up to half its time,
# or nothing, as chance has laid out the heap. So both sides keep theirs.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="unit,mid")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    loads: list[float] = []
    for size in arguments.sizes.split(","):
        for family in arguments.families.split(","):
            call = f"print(json.dumps(throughput({family!r}, {size!r}, {arguments.rounds})))"
            found = json.loads(in_child("bench.cache_encoding", call, MALLOC))
            rows += found
            loads.append(os.getloadavg()[1])
            print(*found, f"load {loads[-1]:.1f}", sep="\n", file=sys.stderr, flush=True)
    report("Cache: encoding", explained(rows, arguments.rounds, loads))


def explained(rows: list[list[str]], rounds: int, loads: list[float]) -> str:
    """The table and what it shows, measured in so many rounds at ``loads`` of the machine."""
    sizes = dict.fromkeys(row[0] for row in rows)
    cut = f"Wide: whole autoencoders (PixArt Sigma's is SDXL's), {cuts()}. " if "wide" in sizes else ""
    head = [
        "model",
        "family",
        "what",
        "encoder alone",
        "with decoding",
        "our step",
        "of alone",
        "of decoding",
        "CPU of alone",
    ]
    note = (
        "\n\nPictures or texts a second by the clock, the best of alternating rounds, with one thread for the encoder "
        "on either side; our step decodes and writes on the other core. *Encoder alone*: the models' calls on ready "
        "batches, of a unit or mid autoencoder in the faster of both memory layouts. *With decoding*: the same after "
        "Pillow's decoding and resizing of the same files, or the family's cleaning and tokenizing. *Our step* also "
        "checks, hashes, keys, shards and writes. *CPU of alone*: what it takes on all cores, the encoder alone = 1. "
        f"{'; '.join(described(size) for size in sizes)}. Sana's are {SANA_SQUARE[0]} px but for the wide model. {cut}"
        f"Loading is counted nowhere. {BATCH} texts a batch. {rounds} rounds at a load of {min(loads):.0f} to "
        f"{max(loads):.0f}."
    )
    return table(head, rows) + note


def scale_of(size: str, name: str) -> Scale:
    """How much is encoded with models of a size for one family."""
    scale = SCALES[size]
    return scale if name != "sana" or size == "wide" else replace(scale, edge=SANA_SQUARE[0], file=SANA_SQUARE)


def described(size: str) -> str:
    """What is encoded with models of one size, in words."""
    scale = SCALES[size]
    width, height, kind = scale.file
    return (
        f"{size.capitalize()}: {scale.counts['cache_vae']} pictures, {scale.batch} a batch, {scale.edge} px of "
        f"{kind.upper()} files of {width}x{height}, and {scale.counts['cache_text_embeds']} captions"
    )


def throughput(name: str, size: str, rounds: int) -> list[list[str]]:
    """A row of the table for pictures, and one for texts."""
    kinds = list(KINDS)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        scale = scale_of(size, name)
        write_models(name, size, scratch / "base")
        ref = ModelRef.model_validate({"family": name, "path": str(scratch / "base")})
        for kind, count in scale.counts.items():
            file = scale.file if kind == "cache_vae" else (16, 16, "png")
            make_dataset(scratch / kind, count, file)
            make_dataset(scratch / f"{kind}-start", scale.first[kind], file)
        works = bare_pictures(ref, scratch / "cache_vae", scale) | bare_texts(ref, scale.counts["cache_text_embeds"])
        for kind in scale.counts:
            works |= {f"{kind} whole": partial(run_afresh, kind, ref, scratch / kind, scale)}
            works |= {f"{kind} start": partial(run_afresh, kind, ref, scratch / f"{kind}-start", scale)}
        # Calls of wide models take many seconds: no time to warm up, for a layout that is known as slower, nor for one
        # autoencoder twice.
        if size == "wide":
            works.pop("cache_vae alone plain")
            kinds = kinds[1:] if name == "pixart_sigma" else kinds
        works = {label: work for label, work in works.items() if label.split()[0] in kinds}
        if size != "wide":
            alternate(1, works)
        seconds = alternate(rounds, works)
    if "cache_vae alone plain" in seconds:
        seconds["cache_vae alone"] = min(seconds["cache_vae alone"], seconds["cache_vae alone plain"], key=wall)
    return [row(size, name, kind, seconds) for kind in kinds]


def row(size: str, name: str, kind: str, seconds: Mapping[str, Spent]) -> list[str]:
    """What was found for pictures or texts."""
    scale = scale_of(size, name)
    alone, prepared = (seconds[f"{kind} {loop}"] for loop in ("alone", "prepared"))
    whole, start = (seconds[f"{kind} {part}"] for part in ("whole", "start"))
    # The step on a few samples is loading and little else.
    counted = scale.counts[kind] / (scale.counts[kind] - scale.first[kind])
    ours = Spent((whole.cpu - start.cpu) * counted, (whole.wall - start.wall) * counted)
    rates = [scale.counts[kind] / one.wall for one in (alone, prepared, ours)]
    shown = [f"{rate:,.0f}" if rate >= 10 else f"{rate:.3f}" for rate in rates]
    shares = f"{alone.wall / ours.wall:.0%}", f"{prepared.wall / ours.wall:.0%}", f"{ours.cpu / alone.cpu:.2f}"
    return [size, name, KINDS[kind], *shown, *shares]


def wall(spent: Spent) -> float:
    """Seconds by the clock."""
    return spent.wall


def write_models(name: str, size: str, folder: Path) -> None:
    """A unit pipeline; for ``mid`` and ``wide`` models with a larger autoencoder and larger text encoders."""
    pipeline = build_pipeline(name, "unit")
    if size != "unit":
        torch.manual_seed(0)
        vae = mid_autoencoder(name) if size == "mid" else wide_autoencoder(name)
        pipeline.register_modules(vae=vae)
        for part in ("text_encoder", "text_encoder_2"):
            small = getattr(pipeline, part, None)
            if small is not None:
                sizes = mid_text_sizes(small) if size == "mid" else text_sizes(small)
                pipeline.register_modules(**{part: larger(small, sizes)})
    write_pipeline(pipeline, folder)


def mid_autoencoder(name: str) -> nn.Module:
    """Of at most 64 channels."""
    channels = (16, 32, 64, 64)
    vae: nn.Module = dc_autoencoder(channels, 4) if name == "sana" else kl_autoencoder(channels, 4)
    return vae


def mid_text_sizes(encoder: Any) -> dict[str, int]:
    """Six layers of width 256."""
    config = encoder.config
    sizes: dict[str, int] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    if config.model_type == "t5":
        sizes = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 6, "num_heads": 4}
    elif config.model_type == "gemma2":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64}
    else:
        sizes |= {"num_attention_heads": 4, "projection_dim": 256}
    return sizes


def larger(encoder: Any, sizes: dict[str, int]) -> nn.Module:
    """A text encoder of the same kind and other size."""
    config = encoder.config
    others = {key: value for key, value in config.to_dict().items() if key != "layer_types"}  # One for each layer.
    made: nn.Module = type(encoder)(type(config).from_dict(others | sizes))
    return made.eval()


def bare_pictures(ref: ModelRef, dataset: Path, scale: Scale) -> dict[str, Callable[[], object]]:
    """Both bare loops over the VAE."""
    family = load_family(ref.family)
    vae = family.load_vae(ref, CPU)
    plain: Any = family.load_vae(ref, CPU).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    edge, batch = scale.edge, scale.batch
    noise = torch.randn(batch, *family.latent_shape(vae, edge, edge))
    files = [dataset / sample.file for sample in read_rows(dataset, "samples.jsonl", Sample)]
    groups = [files[start : start + batch] for start in range(0, len(files), batch)]
    placement = place(geometry(edge), *scale.file[:2], "")
    assert isinstance(placement, Placement)  # Nothing limits it.
    pixels = torch.randn(batch, 3, edge, edge)
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
            ready = torch.stack([to_pixels(open_picture(file), placement) for file in group])
            family.encode_pixels(vae, ready, noise)

    return {"cache_vae alone": alone_last, "cache_vae alone plain": alone_plain, "cache_vae prepared": prepared}


def bare_texts(ref: ModelRef, count: int) -> dict[str, Callable[[], object]]:
    """Both bare loops over the text encoders; the ready batches are those that the family itself makes."""
    family = load_family(ref.family)
    encoders = family.load_text_encoders(ref, CPU)
    section = CacheTextSection(model=ref, text_encoder_batch_size=BATCH)
    texts = sorted((caption(index) for index in range(count)), key=len)
    calls = recorded(encoders, lambda: encode_texts(family, encoders, texts, section))

    @torch.inference_mode()
    def alone() -> None:
        for model, arguments, named in calls:
            model(*arguments, **named)

    def prepared() -> None:
        family.tokenize(encoders, texts, section)
        alone()

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


def run_afresh(kind: str, ref: ModelRef, dataset: Path, scale: Scale) -> None:
    """Run a cache step on an empty store."""
    out = dataset.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    run_step(kind, ref, dataset, out, scale.edge, scale.batch)


def run_step(kind: str, ref: ModelRef, dataset: Path, out: Path, edge: int, batch: int = 4) -> None:
    """Run one cache step; pictures end up ``edge`` pixels wide and high."""
    if kind == "cache_vae":
        datasets = (DatasetGeometry(id="bench", geometry=geometry(edge)),)
        cache_vae(CacheVaeSection(model=ref, datasets=datasets, dtype="bf16", vae_batch_size=batch), dataset, out)
    else:
        cache_text_embeds(CacheTextSection(model=ref, text_encoder_batch_size=BATCH, dtype="bf16"), dataset, out)


def geometry(edge: int) -> Geometry:
    """The middle square of a picture."""
    return Geometry(resolution=edge, resolution_type="pixel", aspect_bucket_alignment=8, crop=True, crop_style="center")


def make_dataset(folder: Path, count: int, file: tuple[int, int, str]) -> None:
    """A dataset artifact of ``count`` different pictures."""
    make_pictures(folder, count, *file)
    download(folder)


def make_pictures(folder: Path, count: int, width: int, height: int, kind: str = "png") -> None:
    """Noise that is quick to draw, cut at different places of one large picture; blurred as a photograph for JPEG."""
    pictures = folder.parent / f"{folder.name}-pictures"
    pictures.mkdir(parents=True)
    large = Image.effect_noise((width + 400, height + 400), 60).convert("RGB")
    if kind == "jpg":
        large = large.resize((large.width // 4, large.height // 4)).resize(large.size, Image.Resampling.BICUBIC)
    for index in range(count):
        left, top = index % 400, index // 400
        cut = large.crop((left, top, left + width, top + height))
        cut.save(pictures / f"{caption(index)}.{kind}", compress_level=1, quality=90)


def download(folder: Path) -> None:
    """The step that makes the dataset artifact."""
    source = DatasetSource(id="bench", instance_data_dir=str(folder.parent / f"{folder.name}-pictures"))
    download_dataset(DownloadSection(datasets=(source,)), folder)


def caption(index: int) -> str:
    """About a dozen words."""
    return f"a picture number {index} with {index % 7} red rings on a white background and little else"


if __name__ == "__main__":
    main()
