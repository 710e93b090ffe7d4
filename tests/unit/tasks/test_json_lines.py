from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tasks.json_lines import read_rows, write_rows


@given(st.lists(st.dictionaries(st.text(), st.text())))
def test_every_text_comes_back(tmp_path_factory, rows: list[dict[str, str]]) -> None:  # type: ignore[no-untyped-def]
    path: Path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == rows


def test_a_line_ends_at_a_newline_alone(tmp_path: Path) -> None:
    rows = [{"answer": "one\u2028two\x85three\r\nfour\x0b\x1e"}, {"answer": "after"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 2
    assert read_rows(tmp_path / "rows.jsonl") == rows
