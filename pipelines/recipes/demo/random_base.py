"""Makes a base that knows nothing yet, and the recipe that trains it.

    python -m pipelines.recipes.demo.random_base --family sana --out runs/from-scratch

The autoencoder and text encoders are the demo's, so only the denoiser has to be learned, all of it.
"""

import argparse
import json
import shutil
from pathlib import Path

from pipelines.recipes.demo.models import FAMILIES, build_pipeline

HERE = Path(__file__).parent
# Flow matching learns these pictures in the fewest steps.
STEPS = {"sana": 1200, "pixart_sigma": 2500, "sdxl": 2500}
LEARNING_RATE = {"sana": 4e-3, "pixart_sigma": 3e-3, "sdxl": 3e-3}
# The families that predict noise learn faster when the loss of low noise levels weighs less.
WEIGHTING: dict[str, dict[str, object]] = {"sana": {}, "pixart_sigma": {"snr_gamma": 5.0}, "sdxl": {"snr_gamma": 5.0}}


def make_random_base(family: str, out: Path, seed: int = 0) -> None:
    """Copy the demo base of ``family`` to ``out`` and replace its denoiser by a freshly initialised one."""
    name = "unet" if family == "sdxl" else "transformer"
    shutil.copytree(HERE / "bases" / family, out, dirs_exist_ok=True)
    for file in (out / name).iterdir():
        file.unlink()
    fresh = build_pipeline(family, "demo", seed=seed)
    getattr(fresh, name).save_pretrained(out / name)


def recipe(family: str, base: Path) -> dict[str, object]:
    """The fine-tuning recipe of ``family``, turned into full training of ``base``."""
    config = json.loads((HERE / f"{family}.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if not name.startswith(("lora_", "peft_"))}
    changed = {
        "pretrained_model_name_or_path": str(base),
        "model_type": "full",
        "max_train_steps": STEPS[family],
        "learning_rate": LEARNING_RATE[family],
        "lr_warmup_steps": 50,
        "checkpoint_step_interval": 500,
    }
    return kept | changed | WEIGHTING[family]


def main() -> None:
    """Parse the command line; write ``base/`` and ``config.json`` into the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base = arguments.out / "base"
    make_random_base(arguments.family, base, arguments.seed)
    text = json.dumps(recipe(arguments.family, base), indent=2)
    (arguments.out / "config.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
