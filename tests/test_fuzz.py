"""Damaged files, some of each kind; thousands of them are `python -m benchmarks.fuzz`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.damage import Changes
from benchmarks.fuzz import TARGETS, Base, fuzz, make_base, one_case

QUICK = {"space": 40, "best": 40, "prompts": 12, "weights": 4, "adapter": 4, "model": 40}
QUICK |= {
    "model-config": 40,
    "events": 3,
    "settings": 1,
    "study": 3,
    "resume-study": 3,
    "page": 1,
    "checkpoint": 4,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", QUICK)
def test_no_file_brings_a_command_down(name: str, base: Base) -> None:
    found: list[str] = []

    fuzz(base, [name], QUICK[name], 0, lambda *said: found.append(" ".join(map(str, said))))

    assert not found, found[0]


def with_values(content: bytes, **values: Any) -> bytes:
    return json.dumps(json.loads(content) | values).encode()


def of_a_model(content: bytes, name: Any) -> bytes:
    return with_values(content, model=json.loads(content)["model"] | {"name": name})


def torn_json(study: bytes) -> bytes:
    return study.replace(b'"FloatDistribution"', b'"FloatDistribution,')


DAMAGED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "pages of the study are lost": ("study", lambda old: old[: 8 * 4096] + bytes(len(old))),
    "no JSON in the study": ("study", torn_json),
    "no JSON in a study that is resumed": ("resume-study", torn_json),
    "a setting of another kind": ("settings", lambda old: old + b"\nmlflow: 1\n"),
    "half a character": (
        "settings",
        lambda old: old.replace(b"mlflow: null", b'mlflow: "\\ud800"'),
    ),
    "a model without a name": ("prompts", lambda old: of_a_model(old, [1])),
    "a name too long for a path": ("prompts", lambda old: of_a_model(old, "x" * 5000)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_that_brought_a_command_down(damage: str, base: Base, tmp_path: Path) -> None:
    name, change = DAMAGED[damage]

    class Change(Changes):
        def _bytes_or(self, content: bytes, *_: object) -> bytes:
            changed = change(content)
            assert changed != content
            return changed

        sqlite = _bytes_or

    changes = Change(base.canary, random.Random(0))

    assert one_case(base, TARGETS[name], tmp_path / "case", changes) is None


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("space", "parameters: !!python/object/apply:os.mkdir ['{canary}']\n"),
        ("best", "trials: !!python/object/apply:os.mkdir ['{canary}']\n"),
        ("settings", "trials: !!python/object/apply:os.mkdir ['{canary}']\n"),
        ("checkpoint", "cos\nmkdir\n(V{canary}\ntR."),  # a pickle that makes a folder
        ("rows", "cos\nmkdir\n(V{canary}\ntR."),
    ],
)
def test_what_asks_to_be_executed_is_not(
    name: str, payload: str, base: Base, tmp_path: Path
) -> None:
    class Payload(Changes):
        def _bytes_or(self, *_: object) -> bytes:
            return payload.format(canary=base.canary).encode()

        def pickle(self, _: bytes) -> bytes:
            return self._bytes_or()

    changes = Payload(base, random.Random(0))

    assert one_case(base, TARGETS[name], tmp_path / "case", changes) is None


def test_what_goes_wrong_is_seen(base: Base, tmp_path: Path) -> None:
    def raises(_: Path) -> int:
        raise ValueError("torn")

    def executes(_: Path) -> int:
        base.canary.mkdir()
        return 0

    wrong = {"ValueError: torn": raises, "exit code 3": lambda _: 3, "was executed": executes}
    for said, give in wrong.items():
        target = replace(TARGETS["space"], give=give)
        found = one_case(base, target, tmp_path / "case", Changes(base.canary, random.Random(0)))
        assert said in str(found)
