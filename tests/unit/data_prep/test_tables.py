from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.tables import BATCH_ROWS, PAIR_SCHEMA, iter_rows, read_arrow, read_table, table_writer, write_table

SCHEMA = pa.schema([("number", pa.int32()), ("text", pa.string())])


def rows(count: int) -> list[dict[str, object]]:
    return [{"number": number, "text": f"é{number}"} for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, BATCH_ROWS, BATCH_ROWS + 1])
def test_rows_come_back_memory_mapped(tmp_path: Path, count: int) -> None:
    path = tmp_path / "a.arrow"
    assert write_table(rows(count), path, SCHEMA) == count
    table = read_table(path)
    assert table.to_list() == rows(count)
    assert (table.cache_files[0]["filename"] if count else str(path)) == str(path)
    assert list(iter_rows(path, ["text"])) == [{"text": row["text"]} for row in rows(count)]
    assert read_arrow(path, ["number"]).to_pylist() == [{"number": row["number"]} for row in rows(count)]


def test_the_same_rows_give_the_same_bytes_however_they_are_chunked(tmp_path: Path) -> None:
    whole = pa.Table.from_pylist(rows(2500), schema=SCHEMA)
    pieces = pa.concat_tables([whole.slice(0, 7), whole.slice(7, 1100), whole.slice(1107)])
    write_table(rows(2500), tmp_path / "a", SCHEMA)
    write_table(pieces, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_was_not_finished_does_not_take_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_table(rows(1), path, SCHEMA)

    def fail_half_way() -> None:
        with table_writer(path, SCHEMA) as writer:
            for row in rows(3 * BATCH_ROWS):
                writer.append(row)
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        fail_half_way()
    assert [file.name for file in tmp_path.iterdir()] == ["a.arrow"]
    assert read_table(path).num_rows == 1


def test_pairs_read_as_message_lists(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
        "source": "s",
        "group": "g",
        "weight": 1.0,
    }
    write_table([row], tmp_path / "a", PAIR_SCHEMA)
    assert read_table(tmp_path / "a")[0] == row
