"""What the commands make of files that were damaged, cut short or written by somebody else.

    python -m benchmarks.fuzz [--cases 2000] [--seed 0] [--only events,prompts]

A run of a tiny model is made once. Then each case changes one of its files, a few bytes or a value
somewhere in its structure, and gives the folder to the command that reads it. A command must come
back within seconds with one of its exit codes; it must raise nothing, start no program, and the
report must open every run. Some values try to get executed: tags of YAML, pickled calls, templates.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.damage import Changes
from tests.trained import flags
from tune_app.apply import cli as apply
from tune_app.models.checks import check_files
from tune_app.report import cli as report
from tune_app.run.search_config import ConfigError
from tune_app.search import cli as search
from tune_app.study.yaml_space import load_space
from tune_app.train.cli import parse_train_args

LONGEST_S = 30  # of one case; a busy machine takes up to a second
SPACE = """\
fixed: {weight_decay: 0.01}
parameters:
  lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e-1}
  scheduler:
    space: choice
    categories: [linear, polynomial]
  power:
    space: uniform
    lower: 1.0
    upper: 3.0
    when: {scheduler: polynomial}
  warmup_steps: {space: randint, lower: 0, upper: 5}
enqueue: [{lr: 0.01, scheduler: linear, warmup_steps: 2}]
"""


@dataclass(frozen=True)
class Base:
    """The files that are changed. canary: what exists once anything of them was executed."""

    run: Path
    space: Path
    model: Path
    adapter: Path
    canary: Path


def make_base(folder: Path) -> Base:
    run, space = folder / "run", folder / "space.yaml"
    space.write_text(SPACE)
    given = [*flags(folder), "--executor=in-process", "--trials=4", "--scheduler=none"]
    given += ["--confirm=1", "--confirm-seeds=1", f"--space={space}", f"--out={run}"]
    with quiet() as said:
        code = search.main(given)
    assert code == 0, said.getvalue()
    with contextlib.closing(sqlite3.connect(run / "study.db")) as study:
        # As after the command's end: until then what was written last is in a file next to it.
        study.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    adapter = folder / "adapter"  # as PEFT has it
    adapter.mkdir()
    for file in (run / "prompts").glob("adapter_*"):
        shutil.copy(file, adapter)
    return Base(run, space, folder / "tiny", adapter, folder / "canary")


# ---------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """files: patterns below the base's folder that is copied
    change: the name of the method of `Changes` that changes one of them
    give: the folder to whoever reads it; its exit code
    codes: that are right
    """

    folder: str
    files: str
    change: str
    give: Callable[[Path], int]
    codes: tuple[int, ...] = (0, 2)


def _report(run: Path) -> int:
    return report.main([str(run)])


def _apply(folder: Path) -> int:
    texts = folder / "texts.txt"
    texts.write_text("wing nest\nfin water\n")
    # A folder that says nothing of its backbone would start a private swarm.
    return apply.main([str(folder), "--input", str(texts), "--quiet", "--backbone=local"])


def _apply_changed_weights(folder: Path) -> int:
    """As if the folder's maker had changed them: their checksum is right."""
    about = folder / "prompts.json"
    document = json.loads(about.read_text())
    weights = (folder / "prompts.safetensors").read_bytes()
    about.write_text(json.dumps(document | {"weights_sha256": sha256(weights).hexdigest()}))
    return _apply(folder)


def _export(run: Path) -> int:
    shutil.rmtree(run / "prompts", ignore_errors=True)
    return _apply(run)


def _resume(run: Path) -> int:
    here = ["--executor=in-process", "--backbone=local"]  # settings that are lost would start more
    return search.main(["--resume", str(run), "--trials=4", "--confirm=0", "--quiet", *here])


def _or_2(work: Callable[[], Any]) -> int:
    try:
        work()
    except ConfigError as error:
        print(error)
        return 2
    return 0


def _space(folder: Path) -> int:
    def work() -> None:
        space = load_space(str(folder / "space.yaml"))
        space.describe()
        space.sample(3, 0)

    return _or_2(work)


def _best(run: Path) -> int:
    return _or_2(lambda: parse_train_args([f"--config={run / 'best.yaml'}"]))


def _model(folder: Path) -> int:
    return 2 if check_files(folder) else 0


TARGETS = {
    "events": Target("run", "events.jsonl", "lines", _report, (0,)),
    "settings": Target("run", "search.yaml", "yaml", _report, (0,)),
    "study": Target("run", "study.db", "sqlite", _report, (0,)),
    "page": Target("run", "prompts/prompts.json", "json", _report, (0,)),
    "rows": Target("run", "trials/*/test_rows.npz", "pickle", _report, (0,)),
    "resume": Target("run", "s[ep]a[rc][ce]*.yaml", "yaml", _resume),
    "resume-study": Target("run", "study.db", "sqlite", _resume, (0, 1, 2)),
    "resume-events": Target("run", "events.jsonl", "lines", _resume, (0, 1, 2)),
    "checkpoint": Target("run", "trials/*/checkpoint/state.pt", "pickle", _export),
    "best": Target("run", "best.yaml", "yaml", _best),
    "space": Target("space", "space.yaml", "yaml", _space),
    "prompts": Target("run/prompts", "prompts.json", "json", _apply),
    "weights": Target(
        "run/prompts", "prompts.safetensors", "safetensors", _apply_changed_weights
    ),
    "adapter": Target("adapter", "adapter_*", "safetensors", _apply, (2,)),
    "model": Target("tiny", "*.safetensors", "safetensors", _model),
    "model-config": Target("tiny", "config.json", "json", _model),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ cases


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What is printed meanwhile."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


class _TooLong(BaseException):  # no `except Exception` hides it
    pass


_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
_started: list[str] = []


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if args[:1] == ("git",):  # wandb asks it where it is
        return
    if event == "subprocess.Popen" or event in _STARTS:
        _started.append(f"{event} {args[:2]}")


def _alarm(*_: object) -> None:
    raise _TooLong


def one_case(base: Base, target: Target, folder: Path, changes: Changes) -> str | None:
    """What is wrong with what the command did; None if nothing is."""
    source = base.space if target.folder == "space" else base.run.parent / target.folder
    shutil.rmtree(folder, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, folder)
    else:
        folder.mkdir()
        shutil.copy(source, folder)
    file = changes.rng.choice(sorted(folder.glob(target.files)))
    file.write_bytes(getattr(changes, target.change)(file.read_bytes()))
    _started.clear()
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        with quiet() as said:
            code = target.give(folder)
    except _TooLong:
        return f"takes longer than {LONGEST_S} s\n{traceback.format_exc()}"
    except (Exception, SystemExit):
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if base.canary.exists():
        base.canary.rmdir()
        return "what was in the file was executed"
    if _started:
        return f"started {_started[0]}"
    if "Traceback" in said.getvalue():
        return said.getvalue()
    return None if code in target.codes else f"exit code {code}\n{said.getvalue()}"


def fuzz(
    base: Base, names: Sequence[str], cases: int, seed: int, found: Callable[[str, int, str], None]
) -> Counter[str]:
    """So many cases of each target; `found` is told the target, the case and what is wrong.

    Returns how many cases of each target went wrong. A case follows from target, seed and number.
    """
    wrong: Counter[str] = Counter()
    sys.addaudithook(_listen)
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            for case in range(cases):
                changes = Changes(base.canary, random.Random(f"{name} {seed} {case}"))
                said = one_case(base, TARGETS[name], Path(place, "case"), changes)
                if said is not None:
                    wrong[name] += 1
                    found(name, case, said)
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="of each target (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=f"of {', '.join(TARGETS)}; comma-separated")
    options = parser.parse_args(argv)
    names = options.only.split(",") if options.only else list(TARGETS)
    seen: set[str] = set()  # one of a kind is enough to read

    def found(name: str, case: int, said: str) -> None:
        kind = "\n".join(said.strip().splitlines()[-3:])
        if kind[:200] not in seen:
            seen.add(kind[:200])
            print(f"--- {name}, case {case}\n{said.strip()[-1500:]}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        total = 0
        for name in names:
            wrong = fuzz(base, [name], options.cases, options.seed, found)[name]
            print(f"{name}: {options.cases} cases, {wrong} wrong", flush=True)
            total += wrong
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
