"""What the model libraries print that helps nobody: bars in a pod's log, and the same notice at every import."""

import logging


def hush_libraries() -> None:
    """Turn off diffusers' loading bars and the notice that torchvision is missing, which kubetuner never uses."""
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("transformers.utils.import_utils").addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()
