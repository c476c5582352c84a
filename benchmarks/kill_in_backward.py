"""Servers killed in the middle of a backward pass: whether the losses show it.

    python -m benchmarks.kill_in_backward [--kills 50] [--seed 0]

Prompts of a tiny model are trained on a private swarm in which two servers have all blocks. While a
backward pass is under way, one of the two is killed; it is started again before the next kill. The
losses are compared with those of the same training that nobody disturbs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from benchmarks.kill_and_resume import depth, serves
from tests.tiny_models import write_tiny_model
from tune_app.backbones.swarm import SwarmBackbone
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.server_process import MOST_STARTS
from tune_app.serve.supervisor import private_swarm

_STEPS_APART = 3  # between two kills
_ROWS, _TOKENS, _PROMPT = 64, 24, 4
_KILLS_OF_A_SWARM = 2 * MOST_STARTS  # a server that ends more often stays away
_PATIENCE_S = 120.0


class Training:
    """Prompts before fixed rows, trained to make the hidden states small."""

    def __init__(self, backbone: SwarmBackbone) -> None:
        generator = torch.Generator().manual_seed(0)
        self._backbone = backbone
        tokens_BT = torch.randint(0, 100, (_ROWS, _TOKENS), generator=generator)
        self._embeds_BTH = backbone.embed(tokens_BT).detach()
        prompt_PH = torch.randn(_PROMPT, backbone.hidden_size, generator=generator)
        self._prompt_PH = torch.nn.Parameter(prompt_PH)
        self._optimizer = torch.optim.AdamW([self._prompt_PH], lr=0.01)

    def step(self, before_backward: Callable[[], None]) -> float:
        """The loss before the step."""
        prompt_BPH = self._prompt_PH.expand(_ROWS, -1, -1)
        hidden_BSH = self._backbone.blocks(torch.cat([prompt_BPH, self._embeds_BTH], 1), None)
        loss = hidden_BSH.pow(2).mean()
        before_backward()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def servers() -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [process for process in below if serves(process) and depth(process) == 1]


class Killer:
    """Kills the servers in turn, each a moment after a backward pass has begun.

    in_time: how many of the passes were not over by then
    """

    def __init__(self, rng: random.Random, all_serve: Callable[[], bool]) -> None:
        self._rng, self._all_serve = rng, all_serve
        self.kills = self.in_time = 0
        self.pass_s = 0.02  # what one has taken

    def wait(self) -> None:
        """Until what was killed before serves again."""
        deadline = time.monotonic() + _PATIENCE_S
        while not self._all_serve():
            assert time.monotonic() < deadline, "a server does not come back"
            time.sleep(0.05)

    def kill(self, over: threading.Event) -> None:
        victim = sorted(servers(), key=lambda process: process.cmdline())[self.kills % 2]
        delay_s = self._rng.uniform(0, self.pass_s)

        def kill() -> None:
            time.sleep(delay_s)
            self.in_time += not over.is_set()
            victim.kill()

        threading.Thread(target=kill).start()
        self.kills += 1


def train(folder: Path, kills: int, steps: int, rng: random.Random) -> tuple[list[float], Killer]:
    """The losses of so many steps on a new swarm; a few of them disturbed."""
    said: list[str] = []
    with private_swarm(ServeConfig(folder, replicas=2, threads=1)) as swarm:
        swarm.tell_changes(said.append)
        backbone = SwarmBackbone(
            folder, peers=swarm.peers, dht_prefix=swarm.dht_prefix, dtype="float32"
        )
        training, losses = Training(backbone), list[float]()
        killer = Killer(rng, lambda: sum(line.endswith("is back") for line in said) == killer.kills)
        for step in range(steps):
            over = threading.Event()
            kills_now = step % _STEPS_APART == _STEPS_APART - 1 and killer.kills < kills
            if kills_now:
                killer.wait()
            began = list[float]()

            def before_backward(
                over: threading.Event = over,
                began: list[float] = began,
                kills_now: bool = kills_now,
            ) -> None:
                began.append(time.monotonic())
                if kills_now:
                    killer.kill(over)

            losses.append(training.step(before_backward))
            over.set()
            if not kills_now:
                killer.pass_s = time.monotonic() - began[0]
        backbone.close()
    return losses, killer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="(default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rng, kills, in_time, worst = random.Random(options.seed), 0, 0, 0.0
    with tempfile.TemporaryDirectory() as place:
        folder = write_tiny_model("llama", Path(place, "tiny"), layers=4, hidden=64)
        steps = (_KILLS_OF_A_SWARM + 1) * _STEPS_APART
        expected, _ = train(folder, 0, steps, rng)
        while kills < options.kills:
            count = min(_KILLS_OF_A_SWARM, options.kills - kills)
            losses, killer = train(folder, count, steps, rng)
            kills, in_time = kills + killer.kills, in_time + killer.in_time
            pairs = zip(losses, expected, strict=True)
            worst = max(worst, *(abs(loss - other) / other for loss, other in pairs))
            print(f"{kills} kills, {in_time} before the pass was over: {worst:.1e}", flush=True)
    print(f"\nThe losses differ from an undisturbed training's by {worst:.1e} of them at most.")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
