"""A store in a bucket beside one in a folder, and beside what google-cloud-storage does alone.

Needs fake-gcs-server (of the extra ``dev``), which runs on the same cores: rates say nothing about the real service,
ratios of the same run do.

Run ``PYTHONPATH=src:. python -m bench.bucket_reading [--samples 4096] [--rounds 5]``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from bench.cache_reading import READS, Ours
from bench.measure import alternate, report, table
from bench.synthetic_cache import write_latents
from kubetuner.artifacts import LatentRow, LatentsArtifact, ShardEntry, read_artifact, read_rows
from kubetuner.data.shards import ShardReader
from kubetuner.store import Store
from kubetuner.store.bucket import Bucket
from tests.servers.gcs import empty_bucket, fake_gcs

LATENT = (4, 64, 64)
THREADS = 8


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, fake_gcs() as host, empty_bucket(host, "bench-bucket"):
        os.environ["STORAGE_EMULATOR_HOST"] = f"http://{host}"
        folder = Path(scratch) / "latents"
        write_latents(folder, arguments.samples, LATENT)
        shards = read_artifact(folder, LatentsArtifact).shards
        far = bucket(Path(scratch) / "mirror")
        for shard in shards:
            far.write_shard(shard, Store(folder).path(shard.file).read_bytes())
        cold = cold_fetch(Path(scratch), host, shards, arguments.rounds)
        warm = warm_reads(folder, far, shards, arguments.rounds)
    report("Store in a bucket", f"{cold}\n\n{warm}")


def bucket(mirror: Path) -> Bucket:
    """The store in the bucket with an own mirror."""
    return Bucket("gs://bench-bucket/store", mirror, 64 << 30)


def cold_fetch(scratch: Path, host: str, shards: tuple[ShardEntry, ...], rounds: int) -> str:
    """The table of downloads into an empty folder."""
    client = storage.Client(
        project="none", credentials=AnonymousCredentials(), client_options={"api_endpoint": f"http://{host}"}
    )
    size = sum(shard.bytes for shard in shards)
    seconds = in_turns(
        rounds,
        scratch / "cold",
        {
            "ours: SHA-256 and CRC32C checked": lambda folder: fetch(bucket(folder), shards),
            f"bare, {THREADS} threads: CRC32C checked": lambda folder: download(client, folder, shards, THREADS),
            "bare, one after the other": lambda folder: download(client, folder, shards, 1),
        },
    )
    client.close()
    wall, cpu = next(iter(seconds.values()))
    rows = [
        [
            name,
            f"{size / its[0] / 1e6:.0f}",
            f"{its[0] / wall:.2f}",
            f"{size / its[1] / 1e6:.0f}",
            f"{its[1] / cpu:.2f}",
        ]
        for name, its in seconds.items()
    ]
    note = (
        f"\n\n{len(shards)} shards, {size / 1e6:.0f} MB; medians of {rounds} alternating rounds. The server, this "
        "process and other jobs share the cores, so threads only cost here: they are for a network that makes one wait."
    )
    head = ["cold fetch", "MB per second", "time, ours = 1", "MB per CPU second", "CPU time, ours = 1"]
    return table(head, rows) + note


def fetch(store: Bucket, shards: tuple[ShardEntry, ...]) -> None:
    """Lease all shards as training would that reads them in order."""
    store.expect(shards)
    for shard in shards:
        store.lease(shard.file).release()


def download(client: storage.Client, folder: Path, shards: tuple[ShardEntry, ...], threads: int) -> None:
    """The same objects by google-cloud-storage alone."""
    folder.mkdir(parents=True)

    def one(shard: ShardEntry) -> None:
        blob = client.bucket("bench-bucket").blob(f"store/shards/{shard.file}")
        blob.download_to_filename(str(folder / shard.file), checksum="crc32c")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, shards))


def in_turns(rounds: int, folder: Path, works: Mapping[str, Callable[[Path], None]]) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each of ``works``, which take turns and begin with no ``folder``."""
    walls: dict[str, list[float]] = {name: [] for name in works}
    cpus: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started, busy = time.perf_counter(), time.process_time()
            work(folder)
            walls[name].append(time.perf_counter() - started)
            cpus[name].append(time.process_time() - busy)
            shutil.rmtree(folder)
    return {name: (statistics.median(walls[name]), statistics.median(cpus[name])) for name in works}


def warm_reads(folder: Path, far: Bucket, shards: tuple[ShardEntry, ...], rounds: int) -> str:
    """The table of random reads."""
    places = [(row.key, row.shard) for row in read_rows(folder, "latents.jsonl", LatentRow)]
    order = random.Random(0)
    picks = [order.randrange(len(places)) for _ in range(READS)]
    works = {}
    for name, store in (("a folder", Store(folder)), ("a warm mirror", Store(far))):
        reader = ShardReader(store)
        reader.verify(shards)
        works[name] = partial(Ours(reader, places, "latents").read, picks)
        works[name]()
    seconds = {name: spent.cpu for name, spent in alternate(rounds, works).items()}
    rows = [[name, f"{READS / took:,.0f}", f"{took / seconds['a folder']:.2f}"] for name, took in seconds.items()]
    note = "\n\nThe first use of each shard, which hashes it, is not counted. CPU time, medians of alternating rounds."
    return table(["random reads from", "reads per CPU second", "time, folder = 1"], rows) + note


if __name__ == "__main__":
    main()
