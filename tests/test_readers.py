"""Files as people have them, and what is said about those that cannot be used."""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas as pd
import pytest

from tune_app.run.search_config import ConfigError
from tune_app.tasks.readers import Reading, class_order, read_texts

FRAME = pd.DataFrame({"text": ['he said "no"', "NA", "two, three"], "label": [1, 0, 1]})


def write(path: Path, content: str) -> str:
    path.write_text(content, "utf-8")
    return str(path)


def error_of(path: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_texts(path, Reading(**{"labels": "classes", **options}))
    return caught.value.messages


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "jsonl", "parquet"])
def test_all_formats_read_the_same(ending, tmp_path):
    path = str(tmp_path / f"data.{ending}")
    if ending == "jsonl":
        FRAME.to_json(path, orient="records", lines=True)
    elif ending == "parquet":
        FRAME.to_parquet(path)
    else:
        FRAME.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    for where in (path, f"file://{path}"):
        read = read_texts(where, Reading("classes"))
        assert read.texts == list(FRAME.text)
        assert read.labels == ["1", "0", "1"]
        assert read.notes == []


@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_plain_text_is_one_stream(ending, tmp_path):
    path = tmp_path / f"book.{ending}"
    path.write_bytes(gzip.compress(b"a\n\nb") if ending == "txt.gz" else b"a\n\nb")
    read = read_texts(str(path), Reading("none"))
    assert read.is_stream
    assert read.texts == ["a\n\nb"]


def test_headerless_tsv_with_stray_quotes_is_recognised(tmp_path):
    path = write(tmp_path / "sst.tsv", '"fresh and\t1\nso "dull\t0\n"a gem" at last\t1\n')
    read = read_texts(path, Reading("classes"))
    assert read.texts == ['"fresh and', 'so "dull', '"a gem" at last']
    assert read.labels == ["1", "0", "1"]
    (note,) = read.notes
    assert "no header" in note
    assert "text is column '0'" in note
    assert "label is column '1'" in note


@pytest.mark.parametrize(
    ("first", "header"),
    [
        ("sentence\tlabel", True),
        ("remark\tverdict", True),
        ("good\tpos", False),  # a value that its column repeats
        ("a rather long sentence\tother", False),
        ("fine\t3", False),
    ],
)
def test_header_is_seen_from_the_first_line(first, header, tmp_path):
    path = write(tmp_path / "data.tsv", f"{first}\nwell done\tpos\nnot at all\tneg\n")
    read = read_texts(path, Reading("classes"))
    assert len(read.texts) == (2 if header else 3)


@pytest.mark.parametrize(("text", "label"), [("remark", "1"), ("1", "stars"), ("remark", "stars")])
def test_columns_by_name_and_by_number(text, label, tmp_path):
    if "1" in (text, label):
        frame = {"remark": ["x y", "z"], "stars": [4, 5]}
        columns = {"text_column": "0" if text == "1" else text, "label_column": label}
    else:
        frame = {"id": [7, 8], "stars": [4, 5], "remark": ["x y", "z"]}
        columns = {"text_column": text, "label_column": label}
    pd.DataFrame(frame).to_csv(tmp_path / "data.csv", index=False)
    read = read_texts(str(tmp_path / "data.csv"), Reading("classes", **columns))
    assert read.texts == ["x y", "z"]
    assert read.labels == ["4", "5"]


def test_two_columns_of_unusual_names_are_told_apart(tmp_path):
    path = write(tmp_path / "data.csv", "verdict,remark\npos,well done\nneg,not at all\n")
    read = read_texts(path, Reading("classes"))
    assert read.texts == ["well done", "not at all"]
    assert "text is column 'remark', label is column 'verdict'" in read.notes[0]


def test_empty_texts_are_dropped_with_their_labels(tmp_path):
    path = write(tmp_path / "data.csv", "text,label\na,x\n,y\n  ,y\nb,z\n")
    read = read_texts(path, Reading("classes"))
    assert (read.texts, read.labels) == (["a", "b"], ["x", "z"])
    assert read.notes == ["data.csv: 2 empty texts were dropped"]


def test_class_order():
    assert class_order({"10", "9", "-1"}) == ("-1", "9", "10")
    assert class_order({"10", "9", "b"}) == ("10", "9", "b")


def test_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path / "train.csv", "text,label\na,x\n")
    (message,) = error_of(str(tmp_path / "trian.csv"))
    assert "no such file" in message
    assert "Did you mean 'train.csv'?" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b"\n\n", "cannot be read as csv"),
        ("a.csv", b"text,label\n\xff\xfe,x\n", "is not utf-8 text; give its --encoding"),
        ("a.csv", b"text,label\na,x\nb,y,z,z\n", "cannot be read as csv"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"', "cannot be read as jsonl"),
        ("a.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("a.tsv.gz", b"not packed", "cannot be read as tsv"),
        ("a.txt", b"plain", "needs labels"),
        ("a.docx", b"x", "got '.docx'"),
        ("a", b"x", "got 'no extension'"),
        ("a.csv", b"text,text\na,x\n", "column names must differ"),
        ("a.csv", b"text,label\n,x\n ,y\n", "all texts are empty"),
        ("a.csv", b"text,label\na,x\nb,\nc\n", "label is missing in rows 2, 3"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"label": 1}\n', "text is missing in rows 2"),
        ("a.jsonl", b'{"text": 5, "label": 1}\n', "must be text, got 5"),
        ("a.csv", b"text\na\n", "give --label-column"),
        ("a.csv", b"id,remark,stars\n1,a,2\n", "give --text-column"),
    ],
)
def test_unusable_files_say_why(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    messages = error_of(str(tmp_path / name))
    assert any(expected in message for message in messages), messages
    assert all(name in message for message in messages)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "data.csv").mkdir()
    assert "is a folder" in error_of(str(tmp_path / "data.csv"))[0]


def test_wrong_columns_are_all_named_with_the_right_ones(tmp_path):
    path = write(tmp_path / "data.csv", "sentence,label\na b,x\n")
    messages = error_of(path, text_column="sentense", label_column="7")
    assert len(messages) == 2
    assert "Did you mean 'sentence'?" in messages[0]
    assert "--label-column '7'" in messages[1]
    assert "'sentence', 'label'" in messages[1]


def test_text_and_label_must_differ(tmp_path):
    path = write(tmp_path / "data.csv", "sentence,label\na b,x\n")
    assert "are both column" in error_of(path, text_column="label")[0]


def test_two_usual_names_are_ambiguous(tmp_path):
    path = write(tmp_path / "data.csv", "text,review,label\na,b,x\n")
    assert "give --text-column: the columns are 'text', 'review'" in error_of(path)[0]
