"""Puts stand-ins in the place of torchvision, torchaudio and skrample for a trainer that imports them."""

import sys
from pathlib import Path


def add_standins() -> None:
    """Let transformers and diffusers find no torchvision, then put the stand-ins on the path for the trainer."""
    import diffusers.utils  # noqa: F401
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    sys.path.append(str(Path(__file__).with_name("standins")))
