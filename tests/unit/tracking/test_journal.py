import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kubetuner.tracking.journal import BATCH, Entry, Journal


def metric(step: int, key: str = "loss") -> Entry:
    return Entry(kind="metric", key=key, value=step / 8, step=step, time=1000 + step)


def adopted(path: Path) -> Journal:
    journal = Journal.adopt(path)
    assert journal is not None
    return journal


def drained(journal: Journal) -> list[list[Entry]]:
    batches = []
    while batch := journal.head():
        batches.append(batch)
        journal.note_sent(len(batch), "r1")
    return batches


def test_what_was_appended_is_found_again(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "spool")
    entries = [
        Entry(kind="start", key="train", text="g", time=7),
        Entry(kind="params", params={"a": "ü"}),
        metric(3),
        Entry(kind="text", key="a.txt", text="one\ntwo"),
    ]
    journal.append(*entries)
    journal.close(delivered=False)

    again = adopted(journal.path)

    assert [entry for batch in drained(again) for entry in batch] == entries
    again.close(delivered=True)
    assert list((tmp_path / "spool").iterdir()) == []


def test_batches_are_one_call_each(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    journal.append(Entry(kind="start"), *(metric(step) for step in range(2 * BATCH + 1)))
    journal.append(Entry(kind="text"), Entry(kind="text"), metric(1))

    batches = drained(journal)

    kinds = [(batch[0].kind, len(batch)) for batch in batches]
    assert kinds == [
        ("start", 1), ("metric", BATCH), ("metric", BATCH), ("metric", 1), ("text", 1), ("text", 1), ("metric", 1),
    ]  # fmt: skip
    assert [entry.step for batch in batches[1:4] for entry in batch] == list(range(2 * BATCH + 1))
    journal.close(delivered=True)


def test_a_replay_goes_on_where_the_sender_stopped(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    journal.append(Entry(kind="start"), metric(1), metric(2), Entry(kind="text", key="a"))
    journal.note_sent(1, "run-7")
    journal.append(metric(9))
    journal.note_sent(2, "run-7")
    journal.close(delivered=False)

    again = adopted(journal.path)

    assert again.run_id == "run-7"
    assert [(entry.kind, entry.step) for batch in drained(again) for entry in batch] == [("text", 0), ("metric", 9)]
    again.close(delivered=True)


@pytest.mark.parametrize("ended", [True, False])
def test_a_journal_knows_whether_its_step_ended(tmp_path: Path, *, ended: bool) -> None:
    journal = Journal.create(tmp_path)
    journal.append(Entry(kind="start", time=5), metric(2))
    if ended:
        journal.append(Entry(kind="end", status="FINISHED", time=2000))
    journal.note_sent(2, "r")
    journal.close(delivered=False)

    again = adopted(journal.path)

    assert again.unended is not ended
    assert again.last_time == (2000 if ended else 1002)
    again.close(delivered=False)


@pytest.mark.parametrize("torn", [b'{"kind":"metric","ke', '{"kind":"text","text":"ü'.encode()[:-1]])
def test_half_a_line_is_cut_off_and_the_journal_goes_on(tmp_path: Path, torn: bytes) -> None:
    journal = Journal.create(tmp_path)
    journal.append(metric(1))
    journal.close(delivered=False)
    with journal.path.open("ab") as stream:
        stream.write(torn)

    second = adopted(journal.path)
    second.append(metric(2))
    second.close(delivered=False)

    third = adopted(journal.path)
    assert [entry.step for entry in third.head()] == [1, 2]
    third.close(delivered=False)


def test_only_one_has_a_journal(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    assert Journal.adopt(journal.path) is None
    journal.close(delivered=False)
    adopted(journal.path).close(delivered=False)


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys\n"
        "from kubetuner.tracking.journal import Entry, Journal\n"
        "journal = Journal.create(pathlib.Path(sys.argv[1]))\n"
        "journal.append(Entry(kind='start', key='train'))\n"
        "assert Journal.adopt(journal.path) is None\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -9
    (path,) = tmp_path.glob("*.jsonl")
    journal = adopted(path)
    assert journal.unended
    journal.close(delivered=False)


def test_journals_sort_by_age(tmp_path: Path) -> None:
    paths = []
    for _ in range(5):
        journal = Journal.create(tmp_path)
        paths.append(journal.path)
        journal.close(delivered=False)
    assert sorted(tmp_path.iterdir()) == paths


def test_a_file_that_is_no_journal_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"kind": "other"}\n')
    with pytest.raises(ValueError, match="kind"):
        Journal.adopt(tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").exists()
    with pytest.raises(FileNotFoundError):
        Journal.adopt(tmp_path / "gone.jsonl")
    assert not (tmp_path / "gone.jsonl").exists()


def test_names_that_are_not_unicode_do_not_raise() -> None:
    entry = Entry(kind="image", key="a\udcff", text="/tmp/\udcff.png", note="\ud800", params={"k\udcff": "v\udcff"})
    assert Entry.model_validate_json(entry.model_dump_json()) == entry
    assert entry.key == "a?"


def test_with_a_full_disk_entries_wait_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal.create(tmp_path)
    journal.append(metric(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # what write() says is what a full disk makes it say
    try:
        for step in range(1, 20):
            journal.append(metric(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.append(metric(20))

    assert [entry.step for entry in journal.head()] == list(range(21))
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
    journal.close(delivered=False)
    again = adopted(journal.path)
    steps = [entry.step for entry in again.head()]
    assert 0 < len(steps) < 20
    assert steps == list(range(len(steps)))
    again.close(delivered=True)
    assert not journal.path.exists()
