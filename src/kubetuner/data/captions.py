"""The captions of a picture, by ``caption_strategy``."""

import posixpath

from kubetuner.config.sections.sources import DatasetSource
from kubetuner.errors import DatasetError
from kubetuner.sources.base import Item, ItemError, Listing, Source


class CaptionError(DatasetError):
    """A picture without the caption its dataset promises; ``reason`` says what is missing."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def captions_for(settings: DatasetSource, picture: Item, listing: Listing, source: Source) -> tuple[str, ...]:
    """Captions of ``picture``, at least one; several are alternatives. An empty caption is a caption.

    Args:
        settings: The dataset's settings.
        picture: A picture of ``listing``.
        listing: Where the file beside the picture is looked up.
        source: Reads that file.

    Raises:
        CaptionError: The caption file is missing or not UTF-8, the source holds no caption, or there is no
            ``instance_prompt`` to use.
        DatasetError: The source fails.
    """
    needs_prompt = (
        settings.caption_strategy == "instanceprompt"
        or settings.only_instance_prompt
        or settings.prepend_instance_prompt
    )
    if needs_prompt and not settings.instance_prompt:
        raise CaptionError(f"dataset {settings.id!r} has no instance_prompt, which its caption settings need")
    if settings.caption_strategy == "instanceprompt" or settings.only_instance_prompt:
        return settings.instance_prompt
    own = _own(settings, picture, listing, source)
    if settings.prepend_instance_prompt:
        return tuple(f"{prompt} {caption}".strip() for prompt in settings.instance_prompt for caption in own)
    return own


def text_name(picture: Item) -> str:
    """Name of the caption file beside ``picture``."""
    return picture.name.rpartition(".")[0] + ".txt"


def _own(settings: DatasetSource, picture: Item, listing: Listing, source: Source) -> tuple[str, ...]:
    if settings.caption_strategy == "textfile":
        return _from_textfile(settings, picture, listing, source)
    if settings.caption_strategy == "filename":
        return (posixpath.splitext(posixpath.basename(picture.name))[0].replace("_", " ").strip(),)
    if fault := caption_fault(settings, picture, source):
        raise CaptionError(fault)
    return picture.captions or ()


def caption_fault(settings: DatasetSource, picture: Item, source: Source) -> str:
    """Why a picture whose caption its source should hold has none that can be used, or nothing."""
    if picture.captions is None:
        return _no_caption(settings, source)
    try:
        "".join(picture.captions).encode()
    except UnicodeEncodeError:  # half of a sign, which JSON can say and a file cannot hold
        return "its caption holds signs that are not Unicode; correct it"
    return ""


def _no_caption(settings: DatasetSource, source: Source) -> str:
    table = settings.metadata_table
    if table is None:
        return f"{source.place} holds no caption for it"
    written = "with" if table.identifier_includes_extension else "without"
    return f"{table.path} has no caption for it: no row whose {table.filename_column} is its path {written} extension"


def _from_textfile(settings: DatasetSource, picture: Item, listing: Listing, source: Source) -> tuple[str, ...]:
    name = text_name(picture)
    file = listing.texts.get(name)
    if file is None:
        raise CaptionError(f"caption file {name} is missing")
    try:
        text = source.read(file).decode("utf-8-sig")
    except ItemError as error:
        raise CaptionError(f"caption file {name} {error.reason}") from error
    except UnicodeDecodeError as error:
        raise CaptionError(f"caption file {name} is not UTF-8 ({error.reason} at byte {error.start})") from error
    # Only newlines part captions, as in SimpleTuner; str.splitlines would also cut at U+2028 and other rare signs.
    parts = [text] if settings.disable_multiline_split else text.split("\n")
    lines = tuple(line.strip() for line in parts if line.strip())
    return lines or ("",)
