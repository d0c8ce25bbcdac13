"""Starts SimpleTuner 4.10.1 from its own environment on a machine without accelerator, network and torchvision.

``python simpletuner_offline.py TIMES.json``; the environment says where SimpleTuner's configuration is. What stands in
its way is put aside here, and nothing of what a step does is touched.
"""

import runpy
import sys
from pathlib import Path

import stopwatch
import torch
from offline import add_standins


def main() -> None:
    """Train as SimpleTuner's configuration in the environment says."""
    stopwatch.start(Path(sys.argv.pop(1)))
    add_standins()
    torch.Tensor.pin_memory = lambda self, *_: self
    from simpletuner.helpers.caching.text_embeds import TextEmbeddingCache
    from simpletuner.helpers.caching.vae import VAECache
    from simpletuner.helpers.models.sana.model import Sana

    Sana.requires_special_scheduler_setup = lambda self: False
    stopwatch.watch_call(VAECache, "process_buckets")
    stopwatch.watch_call(TextEmbeddingCache, "compute_embeddings_for_prompts")
    runpy.run_module("simpletuner.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
