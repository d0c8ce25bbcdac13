"""What sources share that list the files of another source in their own way."""

from kubetuner.sources.base import Item, Source


class Relisted:
    """Reads what ``source`` reads; the listing is a subclass's."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.place, self.key, self.readers = source.place, source.key, source.readers

    def read(self, item: Item) -> bytes:
        """See :class:`Source`."""
        return self._source.read(item)

    def header(self, item: Item, length: int) -> bytes:
        """See :class:`Source`."""
        return self._source.header(item, length)

    def close(self) -> None:
        """See :class:`Source`."""
        self._source.close()
