"""What tests of rounded weights share."""

import sys

import pytest

quantised = pytest.mark.quantised
PRECISIONS = ("int8-torchao", "int8-quanto", "nf4-bnb")
# The libraries' own imports: deprecated parts of torch. numpy 2 warns about diffusers' pictures.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def hide_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where kubetuner was installed without ``quantised``."""
    for module in ("torchao", "optimum.quanto", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, module, None)
