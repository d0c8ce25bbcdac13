"""The pause of the collector around imports; what it saves is held by tests/unit/steps/test_train_start.py."""

import gc
import importlib
import sys
from collections.abc import Iterator

import pytest

from kubetuner.imports import importing

UNUSED = "this"  # A module of the standard library that nothing imports.


@pytest.fixture(autouse=True)
def _as_before(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    sys.modules.pop(UNUSED, None)
    yield
    gc.unfreeze()
    gc.enable()
    sys.modules.pop(UNUSED, None)
    capsys.readouterr()


def test_the_collector_rests_while_modules_come_and_never_looks_at_them() -> None:
    gc.unfreeze()
    with importing():
        assert not gc.isenabled()
        importlib.import_module(UNUSED)
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_without_new_modules_nothing_is_frozen() -> None:
    gc.unfreeze()
    with importing():
        importlib.import_module("json")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_failed_import_turns_the_collector_on_again() -> None:
    with pytest.raises(ModuleNotFoundError), importing():
        importlib.import_module("there_is_no_such_module")
    assert gc.isenabled()


def test_within_another_the_collector_keeps_resting() -> None:
    with importing():
        with importing():
            importlib.import_module(UNUSED)
        assert not gc.isenabled()
    assert gc.isenabled()
