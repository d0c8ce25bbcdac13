"""Names that are imported and never called here."""


class MelScale:
    """See the module."""


class Resample:
    """See the module."""
