"""Files as spreadsheets, exports and people write them: read where it is sure, else it is said what
to do. And splits and samples, in which every class has its share."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer

import tune_app.models.demo
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.tasks.evaluation_file import load_evaluation_file
from tune_app.tasks.files import keep_table
from tune_app.tasks.loading import load_task_data
from tune_app.tasks.readers import Reading, read_texts

WORDS = ["good", "bad", "film", "story", "actor", "plot", "dull", "bright", "slow", "funny"]
CLASSES = Reading("classes")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(tune_app.models.demo.__file__).parent / "model")


def rows_of(labels: str | list[str], count: int = 60) -> list[list[str]]:
    """Different texts with the labels taken in turn."""
    choose = random.Random(0)
    return [
        [f"{' '.join(choose.choices(WORDS, k=5))} {i}", labels[i % len(labels)]]
        for i in range(count)
    ]


def write(path: Path, rows: list[list[str]], header=("text", "label"), **options) -> str:
    encoding = options.pop("encoding", "utf-8")
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, **options).writerows([header, *rows] if header else rows)
    return str(path)


def refusal(path: str, reading: Reading = CLASSES) -> str:
    with pytest.raises(ConfigError) as caught:
        read_texts(path, reading)
    return str(caught.value)


def counts(data, split: str) -> dict[str, int]:
    return dict(zip(data.class_names, data.summary.class_counts[split], strict=True))


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("semicolon.csv", {"delimiter": ";"}),
        ("tabs.csv", {"delimiter": "\t"}),
        ("utf16.csv", {"encoding": "utf-16"}),
        ("utf16.tsv", {"encoding": "utf-16", "delimiter": "\t"}),
        ("marked.csv", {"encoding": "utf-8-sig"}),
    ],
)
def test_a_table_is_read_as_it_was_written(name, options, tmp_path):
    rows = [["été 1", "a"]]
    rows += rows_of("ab")
    read = read_texts(write(tmp_path / name, rows, **options), CLASSES)
    assert read.texts == [text for text, _ in rows]
    assert read.labels == [label for _, label in rows]
    said = [f"{name}: fields are separated by {options.get('delimiter')!r}"]
    assert read.notes == (said if name in ("semicolon.csv", "tabs.csv") else [])


def test_commas_in_semicolons_texts_do_not_mislead(tmp_path):
    rows = [["one, two", "a"], ["three", "b"], ["four, five, six", "a"]]
    assert read_texts(write(tmp_path / "a.csv", rows, delimiter=";"), CLASSES).texts == [
        "one, two",
        "three",
        "four, five, six",
    ]


def test_another_encoding_and_delimiter_are_asked_for_and_taken(tmp_path):
    rows = [["été", "a"]] * 2
    path = write(tmp_path / "a.csv", rows, encoding="latin-1", delimiter="%")
    assert "is not utf-8 text; give its --encoding" in refusal(path)
    read = read_texts(path, Reading("classes", encoding="latin-1", delimiter="%"))
    assert read.texts == [text for text, _ in rows]
    assert "--encoding: must be a name" in refusal(path, Reading("classes", encoding="latin-99"))


@pytest.mark.parametrize("name", ["array.json", "array.jsonl", "lines.json", "marked.jsonl"])
def test_json_is_an_array_or_a_row_a_line(name, tmp_path):
    objects = [{"text": text, "label": label} for text, label in rows_of("ab", 4)]
    objects[0]["text"] = "a line\u2028separator"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects)
    content = json.dumps(objects, indent=1) if "array" in name else lines
    (tmp_path / name).write_text(content, "utf-8-sig" if "marked" in name else "utf-8")
    assert read_texts(str(tmp_path / name), CLASSES).texts == [row["text"] for row in objects]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{\n "data": []\n}\n', "one JSON object over several lines; must be an array"),
        ('["a", "b"]', "a JSON object, item 1 of the array is not"),
        ('{"text": "a", "label": "x"}\n7\n', "a JSON object, line 2 is not"),
    ],
)
def test_json_of_another_shape_is_refused_with_what_to_do(content, expected, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert expected in refusal(str(tmp_path / "a.json"))


# ------------------------------------------------------------------------------- header and labels


def test_an_empty_first_cell_heads_an_index(tmp_path):
    rows = [[str(i), *row] for i, row in enumerate(rows_of("ab"))]
    for header in (("", "text", "label"), ("", "remark", "verdict")):
        path = write(tmp_path / "a.csv", rows, header)
        by_number = Reading("classes", text_column="1", label_column="2")
        for reading in (CLASSES, by_number):
            read = read_texts(path, reading)
            assert (len(read.texts), set(read.labels)) == (60, {"a", "b"})


def test_a_question_is_a_header_where_its_column_never_repeats_it(tmp_path):
    path = write(tmp_path / "a.csv", rows_of("ab"), ("What did you think of it?", "Rating"))
    read = read_texts(path, CLASSES)
    assert (len(read.texts), set(read.labels)) == (60, {"a", "b"})
    assert (
        "the first line is used as column names, because column 'Rating' repeats" in read.notes[0]
    )
    assert "text is column 'What did you think of it?', label is column 'Rating'" in read.notes[1]


def test_one_and_one_point_zero_are_one_class(tmp_path, tokenizer):
    whole = write(tmp_path / "whole.csv", rows_of(["0", "1"]))
    points = write(tmp_path / "points.csv", rows_of(["0.0", "1.0", "1"]))
    config = SearchConfig(train=whole, valid=points, test=points)
    assert load_task_data(config, tokenizer).class_names == ("0", "1")
    rows, _ = load_evaluation_file(whole, config, tokenizer, ("0.0", "1.0"))
    assert rows.labels_N.tolist()[:2] == [0, 1]


def test_a_list_is_no_label(tmp_path):
    path = tmp_path / "lists.jsonl"
    path.write_text('{"text": "x", "label": "a"}\n{"text": "y", "label": ["a", "c"]}\n')
    said = refusal(str(path))
    assert "the label is a list or an object in rows 2" in said
    assert "a row must have one label" in said


def test_classes_nearly_as_many_as_rows_are_remarked(tmp_path, tokenizer):
    scores = write(tmp_path / "scores.csv", rows_of([f"{i * 7 / 100:.2f}" for i in range(60)]))
    with pytest.raises(ConfigError) as caught:
        load_task_data(SearchConfig(train=scores), tokenizer)
    assert "there are 60 classes for 60 different rows" in str(caught.value)
    assert "--task regression" in str(caught.value)
    given = SearchConfig(train=scores, valid=scores, test=scores)
    assert any("60 classes for 60" in note for note in load_task_data(given, tokenizer).notes)


# ---------------------------------------------------------------------------------------- splits


def test_every_split_has_every_class_and_each_its_share(tmp_path, tokenizer):
    rows = rows_of("aaab", 400)
    data = load_task_data(SearchConfig(train=write(tmp_path / "a.csv", rows)), tokenizer)
    assert counts(data, "valid") == counts(data, "test") == {"a": 30, "b": 10}
    few = load_task_data(
        SearchConfig(train=write(tmp_path / "few.csv", rows_of("abc", 12))), tokenizer
    )
    assert counts(few, "valid") == counts(few, "test") == {"a": 1, "b": 1, "c": 1}
    assert counts(few, "train") == {"a": 2, "b": 2, "c": 2}


def test_a_class_of_a_single_row_is_trained_on_and_said_to_be_missing(tmp_path, tokenizer):
    path = write(tmp_path / "once.csv", [*rows_of("ab"), ["only here", "c"]])
    data = load_task_data(SearchConfig(train=path), tokenizer)
    assert counts(data, "train")["c"] == 1
    assert "valid has no rows of class 'c'" in data.notes
    assert "test has no rows of class 'c'" in data.notes


def test_trials_are_compared_on_a_sample_whatever_the_order_of_the_file(tmp_path, tokenizer):
    train = write(tmp_path / "train.csv", rows_of("ab"))
    rows = rows_of("ab", 400)
    judged = []
    for order in (sorted(rows, key=lambda row: row[1]), rows[::-1]):
        valid = write(tmp_path / "valid.csv", order)
        data = load_task_data(SearchConfig(train=train, valid=valid, eval_rows=50), tokenizer)
        assert Counter(data.judged.labels_N.tolist()) == {0: 25, 1: 25}
        assert data.summary.constant["judged"] == 0.5
        assert data.summary.judged == 50
        assert "trials are compared on 50 of 400 valid rows, stratified by class" in str(data.notes)
        assert data.glimpse == 16
        few = data.judged.batch(range(data.glimpse))
        assert Counter(few.labels.tolist()) == {0: 8, 1: 8}
        judged.append(data.judged.fingerprint())
    assert judged[0] == judged[1]
    whole = load_task_data(SearchConfig(train=train, valid=valid, eval_rows=400), tokenizer)
    assert len(whole.judged) == 400
    assert not any("are compared on" in note for note in whole.notes)


def test_numbers_are_sampled_evenly_by_their_size_and_standardised(tmp_path, tokenizer):
    rows = rows_of([str(i) for i in range(400)], 400)
    path = write(tmp_path / "a.csv", rows)
    data = load_task_data(SearchConfig(task="regression", train=path), tokenizer)
    scale = data.summary.scale
    labels = data.train.labels_N
    assert (float(labels.mean()), float(labels.std(correction=0))) == pytest.approx(
        (0, 1), abs=1e-5
    )
    valid = (data.valid.labels_N * scale.std + scale.mean).round()
    assert len(valid) == 40
    assert all(
        3 <= int(((valid >= low) & (valid < low + 40)).sum()) <= 5 for low in range(0, 400, 40)
    )
    assert data.summary.constant["train"] == pytest.approx(0, abs=1e-6)
    assert -0.2 < data.summary.constant["test"] <= 0
    bad = write(tmp_path / "bad.csv", [*rows_of("1", 4), ["well", "good"]])
    assert "the label must be a number, got 'good' in rows 5" in refusal(bad, Reading("numbers"))


def test_the_summary_counts_classes_cuts_and_the_most_frequent_class(tmp_path, tokenizer):
    rows = [
        [f"{text} {'long ' * (i % 10)}", label] for i, (text, label) in enumerate(rows_of("aab"))
    ]
    path = write(tmp_path / "a.csv", rows)
    data = load_task_data(SearchConfig(train=path, max_length=12), tokenizer)
    summary = data.summary
    assert (summary.constant_answer, summary.constant["train"]) == ("a", pytest.approx(2 / 3))
    lengths = sorted(len(ids) for ids in tokenizer([text for text, _ in rows])["input_ids"])
    cut = sum(length > 12 for length in lengths)
    assert data.notes[0].startswith(f"{cut} of 60 train texts are longer than --max-length 12")
    would = int(re.search(r"\(--max-length (\d+) would cut only 5 %\)", data.notes[0])[1])
    assert sum(length > would for length in lengths) <= 3 < sum(n > would - 1 for n in lengths)
    assert type(summary).from_dict(json.loads(json.dumps(summary.to_dict()))) == summary


def test_a_summary_with_facts_of_an_earlier_version_opens(tmp_path, tokenizer):
    data = load_task_data(SearchConfig(train=write(tmp_path / "a.csv", rows_of("ab"))), tokenizer)
    known = data.summary.to_dict()
    assert type(data.summary).from_dict(known | {"cut": {"train": [1, 2]}}) == data.summary


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": True},
        {"judged": [3]},
        {"class_names": ["a"]},
        {"class_names": []},
        {"class_counts": {"train": [30, [30]]}},
        {"class_counts": {"train": [30, "30"]}},
        {"class_counts": {"train": [30, -1]}},
        {"class_counts": {"train": [0, 0]}},
        {"class_counts": {"train": [30, 30], "test": [3]}},
        {"class_counts": {"test": [3, 3]}},
        {"scale": {"mean": "0", "std": 1.0}},
    ],
    ids=str,
)
def test_a_damaged_summary_is_refused(tmp_path, tokenizer, damage):
    """So that a report opens without it, and nothing counts with what is no number."""
    data = load_task_data(SearchConfig(train=write(tmp_path / "a.csv", rows_of("ab"))), tokenizer)
    with pytest.raises((TypeError, ValueError)):
        type(data.summary).from_dict(data.summary.to_dict() | damage)


def test_built_in_rows_that_cutting_makes_equal_are_left_out_and_said(tokenizer):
    data = load_task_data(SearchConfig(max_length=4), tokenizer)
    train, valid, test = (
        {tuple(row.tolist()) for row in split.batch(range(len(split))).tokens_BT}
        for split in (data.train, data.valid, data.test)
    )
    assert not train & valid
    assert not (train | valid) & test
    left_out = [note for note in data.notes if note.endswith("and left out")]
    assert [re.sub(r"^\d+ ", "", note) for note in left_out] == [
        "valid rows are also in train and left out",
        "test rows are also in train or valid and left out",
    ]


def test_texts_that_cutting_makes_equal_are_said_to_be_cut(tmp_path, tokenizer):
    rows = [[f"{'the same words ' * 12}{i}", label] for i, (_, label) in enumerate(rows_of("ab"))]
    path = write(tmp_path / "same.csv", rows)
    with pytest.raises(ConfigError, match="needed after cutting to 16 tokens"):
        load_task_data(SearchConfig(train=path, max_length=16), tokenizer)


# ------------------------------------------------------------------------------ tables in memory


@dataclass
class Wrapped:
    """What `datasets.Dataset` and Arrow's tables have in common."""

    frame: pd.DataFrame

    def to_pandas(self) -> pd.DataFrame:
        return self.frame


@pytest.mark.parametrize("wrap", [lambda frame: frame, Wrapped])
def test_a_table_in_memory_is_read_like_its_file(wrap, tmp_path, tokenizer):
    frame = pd.DataFrame(rows_of(["1", "0"]), columns=["text", "label"])
    frame["label"] = frame["label"].astype(int)
    table = wrap(frame.sample(frac=1, random_state=0))  # with an index of its own
    read = read_texts(table, CLASSES)
    kept = keep_table(table, tmp_path / "data" / "train.parquet")
    assert read_texts(kept, CLASSES) == read
    assert set(read.labels) == {"0", "1"}
    config = SearchConfig(train=kept, valid=kept, test=kept)
    data = load_task_data(config, tokenizer)
    rows, _ = load_evaluation_file(table, config, tokenizer, data.class_names)
    assert rows.fingerprint() == data.train.fingerprint()


def test_a_path_needs_no_keeping(tmp_path):
    assert keep_table("train.csv", tmp_path / "x.parquet") == "train.csv"
    assert not (tmp_path / "x.parquet").exists()


def test_a_table_that_cannot_be_saved_says_why(tmp_path):
    frame = pd.DataFrame({"text": ["a", "b"], "label": [1, "x"]})
    with pytest.raises(ConfigError, match="train: the table cannot be saved"):
        keep_table(frame, tmp_path / "train.parquet")
