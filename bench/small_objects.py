"""Small objects of a bucket: how many a second arrive by the number of readers, when every answer takes its time.

A relay before fake-gcs-server holds each request back for 30 ms, about what the real service takes for a first byte.
Run ``PYTHONPATH=src:. python -m bench.small_objects [--objects 400] [--rounds 5]``.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial

from bench.measure import report, table
from kubetuner.config.sections.sources import DatasetSource
from kubetuner.sources.base import Item
from kubetuner.sources.gcs import GcsSource
from kubetuner.threads import in_threads
from tests.servers.gcs import empty_bucket, fake_gcs

DELAY_SECONDS = 0.03
SIZE = 100_000
READERS = (1, 10, GcsSource.readers, 32)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with fake_gcs() as host, empty_bucket(host, "bench-bucket") as bucket, delayed(host) as relay:
        for index in range(arguments.objects):
            bucket.blob(f"small/{index:04}.png").upload_from_string(os.urandom(SIZE))
        os.environ["STORAGE_EMULATOR_HOST"] = f"http://{relay}"
        settings = DatasetSource(id="bench", type="gcs", instance_data_dir="gs://bench-bucket/small")
        with closing(GcsSource(settings)) as source:
            items = source.listing().pictures
            works: dict[str, Callable[[], object]] = {
                f"ours, {readers} at once": partial(read_all, source, items, readers) for readers in READERS
            }
            works["transfer manager, 8 threads (its default)"] = partial(transfer, source, items)
            times: dict[str, list[float]] = {name: [] for name in works}
            for _ in range(arguments.rounds):
                for name, work in works.items():
                    started = time.perf_counter()
                    work()
                    times[name].append(time.perf_counter() - started)
    rates = {name: len(items) / statistics.median(seconds) for name, seconds in times.items()}
    chosen = rates[f"ours, {GcsSource.readers} at once"]
    rows = [[name, f"{rate:.0f}", f"{rate / chosen:.2f}"] for name, rate in rates.items()]
    note = f"\n\n{len(items)} objects of {SIZE / 1000:.0f} kB. Wall time, medians of alternating rounds."
    report("Small objects of a bucket", table(["readers", "objects a second", "rate, chosen = 1"], rows) + note)


def read_all(source: GcsSource, items: Sequence[Item], readers: int) -> None:
    """Read as ``download_dataset`` does."""
    for _ in in_threads(source.read, items, readers, "bench"):
        pass


def transfer(source: GcsSource, items: Sequence[Item]) -> None:
    """Read the same by google-cloud-storage's transfer manager."""
    from google.cloud.storage import transfer_manager

    with tempfile.TemporaryDirectory() as folder:
        transfer_manager.download_many_to_path(
            source._bucket, [item.name for item in items], destination_directory=folder,
            blob_name_prefix="small/", worker_type=transfer_manager.THREAD, raise_exception=True,
        )  # fmt: skip


@contextmanager
def delayed(host: str) -> Iterator[str]:
    """Host and port of a relay to ``host`` that holds back what clients send."""
    loop = asyncio.new_event_loop()
    address, port = host.split(":")

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, delay: float) -> None:
        while data := await source.read(1 << 16):
            await asyncio.sleep(delay)
            sink.write(data)
            await sink.drain()
        sink.close()

    async def serve(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        upstream, down = await asyncio.open_connection(address, int(port))
        await asyncio.gather(pump(source, down, DELAY_SECONDS), pump(upstream, sink, 0), return_exceptions=True)

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


if __name__ == "__main__":
    main()
