"""Makes a base that knows nothing yet: a demo base whose denoiser has random weights.

    python -m pipelines.recipes.demo.random_base --family sana --out runs/random-base

The autoencoder and text encoders are the demo's, so only the denoiser has to be learned.
"""

import argparse
import shutil
from pathlib import Path

from pipelines.recipes.demo.models import FAMILIES, build_pipeline

BASES = Path(__file__).parent / "bases"


def make_random_base(family: str, out: Path, seed: int = 0) -> None:
    """Copy the demo base of ``family`` to ``out`` and replace its denoiser by a freshly initialised one."""
    name = "unet" if family == "sdxl" else "transformer"
    shutil.copytree(BASES / family, out, dirs_exist_ok=True)
    fresh = build_pipeline(family, "demo", seed=seed)
    getattr(fresh, name).save_pretrained(out / name)


def main() -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_random_base(arguments.family, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
