import tracemalloc
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kubetuner.artifacts import CaptionRow, write_rows
from kubetuner.data.rows import Positions, RowFile
from kubetuner.digests import fingerprint


def _row(number: int) -> CaptionRow:
    return CaptionRow(
        sample=f"a/图 {number}\n.png", texts=tuple(f"text {number}\u2028" * repeat for repeat in range(3))
    )


def test_rows_of_several_files_are_read_in_any_order(tmp_path: Path) -> None:
    assert write_rows(tmp_path, "one.jsonl", map(_row, range(50))) == 50
    assert write_rows(tmp_path, "none.jsonl", []) == 0
    write_rows(tmp_path, "two.jsonl", map(_row, range(50, 83)))
    rows = RowFile(CaptionRow)

    added = [pair for name in ("one", "none", "two") for pair in rows.add(tmp_path / f"{name}.jsonl")]

    assert added == [(number, _row(number)) for number in range(83)]
    positions = (82, 0, 50, 49, 0, 16, 15, 65, 66)
    assert [rows[number] for number in positions] == [_row(number) for number in positions]
    assert len(rows) == 83


def test_rows_outlive_their_file_name(tmp_path: Path) -> None:
    write_rows(tmp_path, "rows.jsonl", [_row(1)])
    rows = RowFile(CaptionRow)
    list(rows.add(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").unlink()
    assert rows[0] == _row(1)


@given(st.lists(st.text(max_size=3)), st.text(max_size=3))
def test_texts_are_found_the_last_first(texts: list[str], text: str) -> None:
    positions = Positions(texts)
    assert positions.of(text) == [place for place in reversed(range(len(texts))) if texts[place] == text]


def test_a_row_takes_less_than_twenty_bytes(tmp_path: Path) -> None:
    write_rows(tmp_path, "rows.jsonl", (CaptionRow(sample=fingerprint(i), texts=("some words",)) for i in range(5000)))
    tracemalloc.start()
    rows = RowFile(CaptionRow)
    places = Positions(row.sample for _, row in rows.add(tmp_path / "rows.jsonl"))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 20 * 5000
    assert places.of(fingerprint(7)) == [7]
