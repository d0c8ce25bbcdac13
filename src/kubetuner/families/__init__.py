"""Model families: one file each, chosen in :func:`load_family` and nowhere else."""

from kubetuner.config.sections.steps import FamilyName
from kubetuner.families.base import Family
from kubetuner.families.notices import hush_libraries
from kubetuner.imports import importing

__all__ = ["Family", "load_family"]


def load_family(name: FamilyName) -> Family:
    """The family called ``name``; imports only that family."""
    with importing():
        hush_libraries()
    match name:
        case "pixart_sigma":
            from kubetuner.families.pixart_sigma import PixArtSigma

            return PixArtSigma()
        case "sdxl":
            from kubetuner.families.sdxl import Sdxl

            return Sdxl()
        case "sana":
            from kubetuner.families.sana import Sana

            return Sana()
