"""Models by hub name, with the hub's own client on a small hub of ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub, hub_server
from tests.tiny_models import write_tiny_model

NAME = "somebody/tiny-llama"
# Each is its own process: the hub's client reads where its hub is when it is imported.
RESOLVE = """
import json, sys
from tune_app.models.folder import model_folder
from tune_app.models.identity import ModelIdentity
from tune_app.run.typed import ConfigError
name, revision = sys.argv[1], sys.argv[2] or None
try:
    folder = model_folder(name, revision)
    print(json.dumps([str(folder), ModelIdentity.of(name, folder, revision).revision]))
except ConfigError as error:
    print(error)
"""
Ask = Callable[..., str]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    main, old = write_tiny_model("llama", root / "main"), write_tiny_model("llama", root / "old")
    for name in ("README.md", "pytorch_model.bin", "model.gguf", "optimizer.pt", "rust_model.ot"):
        (main / name).write_text("not needed")
    (main / "onnx").mkdir()
    (main / "onnx" / "model.safetensors").write_text("not needed")
    pieces = root / "pieces"
    shutil.copytree(old, pieces)
    (pieces / "model.safetensors").rename(pieces / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (pieces / "model.safetensors.index.json").write_text(json.dumps(index))
    (pieces / "model-00007-of-00007.safetensors").write_text("of another index")
    ggufs = root / "ggufs"
    ggufs.mkdir()
    (ggufs / "model.Q4.gguf").write_text("not read")
    models = {
        NAME: {"main": main, "v1": old},
        "somebody/pieces": {"main": pieces},
        "somebody/gated": {"main": main},
        "somebody/ggufs": {"main": ggufs},
    }
    with hub_server(Hub(models, gated={"somebody/gated"})) as hub:
        yield hub


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """Runs RESOLVE with a cache of its own; returns what it prints."""
    hub.requests.clear()

    def run(name: str, revision: str = "", **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE, name, revision],
            env=os.environ | environment_of(hub, tmp_path) | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    return run


def environment_of(hub: Hub, cache: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache / "hf"),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_TOKEN": "",
    }


def names(folder: str) -> list[str]:
    return sorted(file.name for file in Path(folder).iterdir())


SMALL = ["config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]


def test_only_what_is_needed_is_fetched_and_nothing_is_asked_again(hub: Hub, ask: Ask) -> None:
    folder, commit = json.loads(ask(NAME))
    assert commit == hub.commit(NAME, "main")
    assert set(names(folder)) - {"generation_config.json"} == {*SMALL, "model.safetensors"}
    asked = len(hub.requests)
    assert asked > 0
    assert json.loads(ask(NAME)) == [folder, commit]
    assert json.loads(ask(NAME, HF_HUB_OFFLINE="1")) == [folder, commit]
    assert json.loads(ask(NAME, revision=commit)) == [folder, commit]
    assert len(hub.requests) == asked
    (Path(folder) / "model.safetensors").unlink()  # as after a fetch that was cut off
    assert json.loads(ask(NAME)) == [folder, commit]
    assert "model.safetensors" in names(folder)


def test_a_revision(hub: Hub, ask: Ask) -> None:
    folder, commit = json.loads(ask(NAME, "v1"))
    assert commit == hub.commit(NAME, "v1")
    assert Path(folder).name == commit
    assert f"--revision: '{NAME}' has no branch, tag or commit 'v2'." in ask(NAME, "v2")


def test_weights_in_pieces(ask: Ask) -> None:
    found = names(json.loads(ask("somebody/pieces"))[0])
    pieces = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert [name for name in found if name.startswith("model")] == pieces


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("somebody/nothing", "there is no folder 'somebody/nothing' here, and no such model at"),
        ("somebody/gated", "'somebody/gated' is gated: accept its terms at "),
        ("somebody/ggufs", "must have one of model.safetensors, "),
        ("./nothing", "there is no folder './nothing'."),
        ("a/b/c", "must be demo, a model's folder or a hub name (organisation/name), got 'a/b/c'"),
    ],
)
def test_what_cannot_be_fetched_has_one_line(name: str, said: str, ask: Ask) -> None:
    message = ask(name)
    assert message.startswith("--model: ")
    assert said in message
    assert "\n" not in message


def test_a_hub_that_does_not_answer(ask: Ask) -> None:
    message = ask(NAME, HF_ENDPOINT="http://127.0.0.1:9")
    assert "it cannot be downloaded from http://127.0.0.1:9: Connect" in message
    message = ask(NAME, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in message


def test_a_folder_has_no_revision(ask: Ask) -> None:
    assert ask("demo", "v1") == "--revision: only for a model on a hub, got --model 'demo'."


def typed(command: str, hub: Hub, cache: Path) -> subprocess.CompletedProcess[str]:
    hub.requests.clear()
    return subprocess.run(
        [sys.executable, "-m", *command.split()],
        env=os.environ | environment_of(hub, cache),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_takes_a_hub_name(hub: Hub, tmp_path: Path) -> None:
    done = typed(f"tune_app.search --dry-run --model {NAME} --revision v1", hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Nothing has been started." in done.stdout
    assert f"downloading {NAME} from {hub.url} ..." in done.stderr
    assert any(hub.commit(NAME, "v1") in request for request in hub.requests)


@pytest.mark.slow
def test_a_search_in_process_trains_on_the_revision(hub: Hub, tmp_path: Path) -> None:
    short = "--backbone local --executor in-process --trials 1 --steps 1 --confirm 0 --quiet"
    command = f"tune_app.search {short} --model {NAME} --revision v1 --out {tmp_path / 'run'}"
    done = typed(command, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert any(hub.commit(NAME, "v1") in request for request in hub.requests)
    assert not any(hub.commit(NAME, "main") in request for request in hub.requests)


@pytest.mark.slow
def test_serve_takes_a_hub_name(hub: Hub, tmp_path: Path) -> None:
    """With blocks that the fetched model does not have, so that no server is started."""
    done = typed(f"tune_app.serve {NAME} --blocks 90:95 --revision v1", hub, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "blocks must be FIRST:END within 0:2 (the model's blocks), got 90:95." in done.stderr
    assert any(hub.commit(NAME, "v1") in request for request in hub.requests)


def test_serve_has_no_flag_for_the_model(hub: Hub, tmp_path: Path) -> None:
    done = typed("tune_app.serve ./nothing", hub, tmp_path)
    assert (done.returncode, done.stderr) == (2, "MODEL: there is no folder './nothing'.\n")


@pytest.mark.swarm
def test_a_server_of_a_hub_model_names_its_revision(hub: Hub, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tune_app.serve", NAME, "--revision", "v1"],
        env=os.environ | environment_of(hub, tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    ) as serving:
        try:
            printed = ""
            while "Press Ctrl-C" not in printed:
                line = serving.stdout.readline()
                assert line, printed  # it has ended
                printed += line
            serving.send_signal(signal.SIGINT)
            assert serving.wait(30) == 0
        finally:
            serving.kill()

    assert re.search(r"^blocks 0:2  /ip4/127\.0\.0\.1/tcp/", printed, re.MULTILINE)
    assert f"python -m tune_app.search --model {NAME} --revision v1 " in printed
