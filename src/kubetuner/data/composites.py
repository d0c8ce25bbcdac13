"""Pictures that stand side by side in one file (``composite_image_config``), of which one is the sample.

The plan takes the size of the tile for the picture's, and ``download_dataset`` keeps the tile alone, without loss. So
everything after it has a dataset of plain pictures, whose names by content are those of the tiles.
"""

import io

from kubetuner.config.sections.sources import Composite
from kubetuner.data.geometry import Size
from kubetuner.data.pictures import PictureError, decode_layers


def tile_size(size: Size, composite: Composite | None) -> Size:
    """(width, height) of the tile of an upright picture of ``size``; ``size`` itself without ``composite``.

    Raises:
        PictureError: The width is not that of so many equal tiles.
    """
    if composite is None:
        return size
    width, height = size
    if width % composite.count:
        raise PictureError(
            f"its width of {width} pixels is not that of {composite.count} equal pictures side by side "
            "(composite_image_config)"
        )
    return width // composite.count, height


def cut_tile(data: bytes, composite: Composite | None) -> bytes:
    """The tile of the picture ``data``, as PNG; ``data`` itself without ``composite``.

    Raises:
        PictureError: It is damaged, too large or no picture, or has not the width of so many equal tiles.
    """
    if composite is None:
        return data
    image = decode_layers(data)
    width, height = tile_size(image.size, composite)
    left = composite.index * width
    stream = io.BytesIO()
    image.crop((left, 0, left + width, height)).save(stream, "PNG")
    return stream.getvalue()
