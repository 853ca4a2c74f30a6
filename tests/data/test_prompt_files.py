"""Prompt files as they are found in the wild: read, or refused in one line with file, row and column."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vime.data import files
from vime.data.files import Row, read_rows
from vime.data.rows import Columns, cell, read_cells
from vime.errors import BadInput

ROWS = [{"prompt": "1+1=", "label": "2"}, {"prompt": "2+2=", "label": "4"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def cells_of(path):
    return [dict(row.cells) for row in read_rows(path)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", ("\ufeff" + LINES).encode()),
        ("a.jsonl", LINES.replace("\n", "\r\n\r\n").encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json", LINES.encode()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS, indent=4).encode(), mtime=0)),
    ],
)
def test_every_way_of_writing_json_gives_the_same_rows(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert cells_of(path) == ROWS


@given(st.lists(st.dictionaries(st.text(), st.one_of(st.none(), st.integers(), st.text(), st.booleans())), max_size=5))
def test_arrays_lines_and_pretty_printed_objects_are_the_same_rows(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    contents = {
        "lines.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "array.json": json.dumps(rows, indent=1),
        "pretty.json": "\n".join(json.dumps(row, indent=1) for row in rows),
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
        assert cells_of(folder / name) == rows


def parquet(path, rows=ROWS):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def saved_dataset(folder, rows=ROWS):
    """A folder as `datasets.save_to_disk` writes it."""
    import pyarrow

    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    with (
        pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def test_a_folder_of_shards_is_read_in_order(tmp_path):
    for number, row in enumerate(ROWS):
        parquet(tmp_path / f"train-0000{number}-of-00002.parquet", [row])
    (tmp_path / "README.md").write_text("about")
    assert cells_of(tmp_path) == ROWS
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(BadInput, match="lacks shard 1 of 2"):
        cells_of(tmp_path)


def test_a_folder_as_the_hub_has_it_gives_the_split_that_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS[:1])
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[1:])
    with pytest.raises(BadInput, match=r"several splits \(test, train\): give one as .*/data/test"):
        cells_of(tmp_path)
    assert cells_of(tmp_path / "train") == cells_of(tmp_path / "data" / "train") == ROWS[:1]


def test_a_dataset_that_was_saved_is_read(tmp_path):
    saved_dataset(tmp_path / "all" / "train")
    assert cells_of(tmp_path / "all" / "train") == ROWS
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(BadInput, match=r"several splits \(train\): give one as .*/all/train"):
        cells_of(tmp_path / "all")
    (tmp_path / "all" / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(BadInput, match="lacks its file data-00000"):
        cells_of(tmp_path / "all" / "train")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"prompt": "caf\xe9"}\n', "line 1 is not UTF-8 .byte 0xe9 at 16; perhaps latin-1"),
        ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "it is UTF-16"),
        ("a.jsonl", b"question,answer\n1+1,2\n", "line 1 is not JSON .*is it CSV"),
        ("a.jsonl", json.dumps(ROWS, indent=2).encode(), "is one JSON array, not JSON lines: name it .json"),
        ("a.jsonl", b'{"prompt": "a"}\n{broken\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"a": ' + b"[" * 100000 + b"]" * 100000 + b"}", "line 1 is nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("a.json", b'[{"prompt": "a"}, {"prompt": ]', "line 1 is not JSON .*row 2"),
        ("a.json", b'[{"prompt": "a"}', "array is not closed after row 1"),
        ("a.json", b'[{"prompt": "a"},', "array is not closed after row 1"),
        ("a.json", b'[{"prompt": "a"}, 5]', "row 2 is a int"),
        ("a.json", b"[" * 100000, "row 1 is nested too deeply"),
        ("a.csv", b"a,b\n", "neither JSON lines nor parquet"),
        ("a.jsonl.gz", LINES.encode(), "cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput, match=reason) as caught:
        cells_of(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_ROW_BYTES", 2**20)
    (tmp_path / "a.jsonl").write_bytes(LINES.encode() + b'{"prompt": "' + b"a" * 2**21 + b'"}\n')
    with pytest.raises(BadInput, match="line 3 is longer than 1 MiB"):
        cells_of(tmp_path / "a.jsonl")


def test_folders_without_data_and_missing_files_are_named(tmp_path):
    with pytest.raises(BadInput, match="folder without prompt files"):
        cells_of(tmp_path)
    with pytest.raises(BadInput, match="does not exist"):
        cells_of(tmp_path / "none.jsonl")


def refused(cells, reason, **columns):
    with pytest.raises(BadInput, match=reason) as caught:
        read_cells(Row("set.jsonl row 7", cells), Columns(**columns))
    assert str(caught.value).startswith("set.jsonl row 7")


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"text": "a"}, "has no 'prompt' .it has text.: set --input-key"),
        ({"prompt": None}, "has no 'prompt'"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": 5}, "'prompt' is a int"),
        ({"prompt": []}, "role and content"),
        ({"prompt": ["a"]}, "role and content"),
        ({"prompt": [{"role": "user", "content": 5}]}, "role and content"),
        ({"prompt": [{"role": "user", "content": None}]}, "role and content"),
        ({"prompt": "a \ud83d"}, r"'prompt' has half of a surrogate pair .\\ud83d at character 3"),
        ({"prompt": [{"role": "user", "content": "\udc00"}]}, "'prompt' has half of a surrogate pair"),
        ({"prompt": "a", "label": ["\ud800"]}, "'label' has half of a surrogate pair"),
        ({"prompt": "a", "metadata": {"b": {"\ud800": 1}}}, "'metadata' has half of a surrogate pair"),
        ({"prompt": "a", "metadata": [1]}, "'metadata' is a list"),
        ({"prompt": "a", "metadata": "no json"}, "'metadata' is text that is not JSON"),
        ({"prompt": "a", "metadata": '{"a":' * 100000}, "'metadata' is text that is not JSON"),
    ],
)
def test_a_row_that_training_cannot_use_is_refused_by_row_and_column(cells, reason):
    refused(cells, reason)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"prompt": "a"}, "has no 'label' .it has prompt.*--rm-type math needs a label"),
        ({"prompt": "a", "label": None}, "'label' is null"),
        ({"prompt": "a", "label": " "}, "'label' is empty"),
        ({"prompt": "a", "label": "1", "metadata": {"rm_type": "os:system"}}, "rm_type 'os:system', which is none of"),
    ],
)
def test_a_label_is_required_where_the_reward_reads_one(cells, reason):
    refused(cells, reason, reward="math")
    if "rm_type" not in reason:
        assert read_cells(Row("", cells), Columns(reward="my.module:function")).label in (None, " ")
        refused({**cells, "metadata": {"rm_type": "gpqa"}}, "--rm-type gpqa needs a label", reward="my.module:function")


@pytest.mark.parametrize("metadata", ["", " ", None, {}])
def test_empty_metadata_is_none(metadata):
    assert read_cells(Row("", {"prompt": "a", "metadata": metadata}), Columns()).metadata == {}


def test_a_path_reaches_a_nested_column_and_an_exact_name_comes_first():
    row = {"prompt": "a", "reward_model": {"ground_truth": "4", "style": "rule"}, "a.b": 1, "a": {"b": 2}}
    assert read_cells(Row("", row), Columns(label="reward_model.ground_truth", reward="math")).label == "4"
    assert cell(row, "a.b") == 1
    refused(row, r"has no 'reward_model.answer' \(it has a, a.b, prompt, reward_model\)", label="reward_model.answer",
            reward="math")  # fmt: skip
