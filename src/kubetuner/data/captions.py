"""The captions of a picture, by ``caption_strategy``."""

from pathlib import Path

from kubetuner.config.sections import DatasetSource
from kubetuner.errors import DatasetError


class CaptionError(DatasetError):
    """A picture without the caption its dataset promises; ``reason`` says what is missing."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def captions_for(source: DatasetSource, picture: Path, root: Path) -> tuple[str, ...]:
    """Captions of ``picture``, at least one; several are alternatives. An empty caption is a caption.

    Args:
        source: The dataset's settings.
        picture: The picture's path, below ``root``.
        root: The dataset's folder; reasons name files relative to it.

    Raises:
        CaptionError: The caption file is missing or not UTF-8, or there is no ``instance_prompt`` to use.
    """
    needs_prompt = (
        source.caption_strategy == "instanceprompt" or source.only_instance_prompt or source.prepend_instance_prompt
    )
    if needs_prompt and not source.instance_prompt:
        raise CaptionError(f"dataset {source.id!r} has no instance_prompt, which its caption settings need")
    if source.caption_strategy == "instanceprompt" or source.only_instance_prompt:
        return source.instance_prompt
    own = _from_textfile(source, picture, root) if source.caption_strategy == "textfile" else (_from_filename(picture),)
    if source.prepend_instance_prompt:
        return tuple(f"{prompt} {caption}".strip() for prompt in source.instance_prompt for caption in own)
    return own


def _from_filename(picture: Path) -> str:
    return picture.stem.replace("_", " ").strip()


def _from_textfile(source: DatasetSource, picture: Path, root: Path) -> tuple[str, ...]:
    path = picture.with_suffix(".txt")
    name = path.relative_to(root).as_posix()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise CaptionError(f"caption file {name} is missing") from error
    except UnicodeDecodeError as error:
        raise CaptionError(f"caption file {name} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise CaptionError(f"caption file {name} cannot be read ({error.strerror or error})") from error
    # Only newlines part captions, as in SimpleTuner; str.splitlines would also cut at U+2028 and other rare signs.
    parts = [text] if source.disable_multiline_split else text.split("\n")
    lines = tuple(line.strip() for line in parts if line.strip())
    return lines or ("",)
