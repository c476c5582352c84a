"""What packing gains on a GPU, in process and on a private swarm whose servers compute on it.

    python -m benchmarks.gpu [--shape 1b] [--trials 16] [--steps 30]

A model in the shape of Llama 3.2 1B or Llama 3.1 8B with random weights, bfloat16; neither time nor
memory depends on their values. Prints

- the training loop alone, with the rows of 1 to 64 trials in one pack: rows/s and memory,
- the largest pack that the backbone allows, forward and backward, and the memory that it took,
- whole searches through the command, with 1 and with all trials at once.

The limit is what the GPU takes for rows that are many enough to fill it: the last lines of the
first part.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.real_model import command, search
from tests.trials import Spec, make_trial
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import run_alone
from tune_app.backbones.packing import plan, run_pack
from tune_app.models.folder import model_folder
from tune_app.run.trial_config import TrialConfig
from tune_app.train.optim import build_optimizer, build_scheduler

_SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
_ROWS, _TEXT_TOKENS, _PROMPT_TOKENS = 8, 48, 16
_AT_ONCE = (1, 2, 4, 8, 16, 32, 64)
_WARMUP_STEPS, _STEPS = 3, 10


def write_model(shape: str, folder: Path) -> Path:
    """A Llama of this shape with random weights and the demo model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=_SHAPES[shape]["hidden_size"] // 32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        **_SHAPES[shape],
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for file in model_folder("demo").glob("*token*"):
        shutil.copy(file, folder)
    return folder


def loop(backbone: LocalBackbone, at_once: int) -> str:
    """The training loop of so many classification trials, their rows in one pack."""
    spec = partial(Spec, "classification", "ptune", _PROMPT_TOKENS, (_TEXT_TOKENS,) * _ROWS)
    trials = [make_trial(backbone, spec(number)) for number in range(at_once)]
    config = TrialConfig(steps=_WARMUP_STEPS + _STEPS)
    optimizers = [build_optimizer(trial.model.parameters(), config) for trial in trials]
    schedulers = [build_scheduler(optimizer, config) for optimizer in optimizers]
    torch.cuda.reset_peak_memory_stats()
    began = 0.0
    for step in range(_WARMUP_STEPS + _STEPS):
        if step == _WARMUP_STEPS:
            torch.cuda.synchronize()
            began = time.perf_counter()
        requests = [trial.request() for trial in trials]
        sizes = [(request.rows, request.row_tokens) for request in requests]
        (parts,) = plan(sizes, backbone.limits)  # `main` sees to it that all fit
        for trial, answer in zip(trials, run_pack(backbone, requests, parts), strict=True):
            trial.model.prompt_embeddings.grad = answer.prompt_PH
            (trial.model.score.grad,) = answer.head_parameters
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - began) / _STEPS
    return (
        f"{at_once:3} trials: {1000 * step_s:6.1f} ms a step, {at_once * _ROWS / step_s:7.0f} "
        f"rows/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    )


def largest_pack(backbone: LocalBackbone, task: str, text_tokens: int) -> str:
    """One step whose rows fill the largest pack that the backbone allows."""
    rows = backbone.limits.rows(_PROMPT_TOKENS + text_tokens)
    trial = make_trial(backbone, Spec(task, "ptune", _PROMPT_TOKENS, (text_tokens,) * rows))
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run_alone(backbone, trial.request())
    torch.cuda.synchronize()
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    return (
        f"largest pack, {task}, {_PROMPT_TOKENS} + {text_tokens} tokens: {rows} rows, "
        f"{time.perf_counter() - began:.2f} s, {peak / 2**30:.1f} of {total / 2**30:.1f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=_SHAPES, default="1b")
    parser.add_argument("--trials", type=int, default=16, help="of each search; 0: no searches")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    print(*(f"{key}: {value}" for key, value in describe().items()), sep="\n")
    print(f"GPU: {torch.cuda.get_device_name()}", flush=True)
    with tempfile.TemporaryDirectory() as root:
        model = write_model(options.shape, Path(root) / "model")
        torch.cuda.empty_cache()
        began = time.perf_counter()
        backbone = LocalBackbone(model, device="cuda", dtype="bfloat16")
        print(f"opened in {time.perf_counter() - began:.1f} s; {backbone.limits}", flush=True)
        most = backbone.limits.rows(_PROMPT_TOKENS + _TEXT_TOKENS) // _ROWS
        for at_once in (number for number in _AT_ONCE if number <= most):
            print(loop(backbone, at_once), flush=True)
        for task in ("classification", "causal-lm"):
            for text_tokens in (_TEXT_TOKENS, 1008):
                print(largest_pack(backbone, task, text_tokens), flush=True)
        del backbone
        torch.cuda.empty_cache()
        for kind in ("local", "swarm") if options.trials else ():
            for at_once in (options.trials, 1):
                out = Path(root) / f"{kind}-{at_once}"
                words = command(
                    model, kind, options.trials, options.steps, out, device="cuda", at_once=at_once
                )
                print(f"search, {at_once} at once: {search(words)}", flush=True)


if __name__ == "__main__":
    main()
