"""Where ``components/`` and ``pipelines/`` are: in the checkout, not in the installed package."""

import sys
from pathlib import Path

import kubetuner
from kubetuner.errors import InputError


def add_checkout_to_path() -> Path:
    """Find the checkout, make its packages importable and return its folder.

    Raises:
        InputError: There is none beside the package nor in the working directory.
    """
    for root in (Path(kubetuner.__file__).resolve().parents[2], Path.cwd()):
        if (root / "pipelines" / "finetune.py").is_file() and (root / "components").is_dir():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return root
    raise InputError(
        "components/ and pipelines/ were not found: they are part of kubetuner's repository, not of the installed "
        "package. Run this command in a checkout of the repository."
    )
