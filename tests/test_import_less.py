"""What a trial host does not import, and that it is there all the same."""

from __future__ import annotations

import subprocess
import sys

from tests.pages import ROOT

# A host of a local search and the client of a swarm, in a process of their own; one step of AdamW.
_HOST = """
import sys
import torch  # as Ray's workers may have done
from tune_app.models.folder import model_folder
from tune_app.run.search_config import SearchConfig, TrialConfig
from tune_app.search.host import TrialHost

config = SearchConfig(backbone="local", task="causal-lm")
host = TrialHost("host-0", config, str(model_folder("demo")), 1, is_restarted=True)
host.connect(None)
import tune_app.backbones.swarm
from tune_app.train.optim import build_optimizer, build_scheduler
weight = torch.nn.Parameter(torch.ones(2))
optimizer = build_optimizer([weight], TrialConfig())
weight.sum().backward()
optimizer.step()
assert weight[0] < 1
build_scheduler(optimizer, TrialConfig())
print(*sys.modules)
"""
_USED_AFTER_ALL = """
import scipy.optimize
print(scipy.optimize.linear_sum_assignment([[4, 1], [2, 3]])[1])
assert "scipy.optimize._optimize" not in sys.modules
print(scipy.optimize.linprog([1, 1], bounds=(2, 5)).fun)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist())
optimizer.step()
assert torch._dynamo.config and "torch._dynamo.eval_frame" in sys.modules
"""
NOT_LOADED = {
    "scipy.optimize._optimize",
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
}


def test_a_host_does_without_compiler_optimizers_and_distributed_training() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _HOST + _USED_AFTER_ALL],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    modules, assignment, least, compiled = ran.stdout.splitlines()

    assert {"transformers.modeling_utils", "petals", "torch.optim.adamw"} <= set(modules.split())
    assert sorted(NOT_LOADED.intersection(modules.split())) == []
    assert (assignment, least, compiled) == ("[1 0]", "4.0", "[2.0, 2.0]")
