"""The prompt-tuned model: everything that a trial trains, around the frozen backbone it shares.

Parameters have the names and shapes of Petals' own classes, so that tuned prompts load into both:

    prompt_embeddings               [P, H]
    intermediate_prompt_embeddings  [P, L * H]   (deep_ptune)
    score                           [C, H]       (tasks whose rows have labels)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tune_app.backbones.packing import Answer, Head, Request, Sums
from tune_app.backbones.protocol import Backbone
from tune_app.run.search_config import TrialConfig
from tune_app.run.trial_report import Usage
from tune_app.tasks.base import Task
from tune_app.tasks.data import Batch, last_token
from tune_app.tasks.start_tokens import StartTokens
from tune_app.train.prompt_init import initial_prompt

# Runs a request through the blocks, alone or packed with other trials' requests; blocks until done.
Runner = Callable[[Request], Answer]


@dataclass(frozen=True)
class Evaluation:
    """The mean loss (see `Task.unit`), the task's metrics by name, and the mean loss of the first
    batch alone."""

    loss: float
    metric: dict[str, float]
    first_loss: float


class PromptTunedModel(nn.Module):
    """Prompts and, if rows have labels, a score head; nothing else is trained.

    outputs: rows of the score head; 0: there is none

    The backbone is not a submodule: trials share it, and a state dict has only trained parameters.
    """

    def __init__(
        self,
        backbone: Backbone,
        run: Runner,
        task: Task,
        outputs: int,
        config: TrialConfig,
        start: StartTokens | None = None,
    ) -> None:
        """`start`: tokens for an `init` other than normal."""
        super().__init__()
        self._backbone, self._run, self.task = [backbone], run, task
        self.usage = Usage()
        generator = torch.Generator().manual_seed(config.seed)
        hidden, prompt = backbone.hidden_size, config.prompt_length

        def normal(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator).to(backbone.device)

        # float32 whatever the backbone's dtype, as in Petals. All normal values are drawn first and
        # in this order, so with the same seed only the prompts depend on `init`.
        normal_PH = normal(prompt, hidden)
        deep = score = None
        if config.tuning_mode == "deep_ptune":
            deep = normal(prompt, backbone.num_blocks * hidden)
            deep = deep.zero_() if config.deep_init == "zero" else deep
        if outputs:
            # 0.02 is the initializer_range of most families.
            score = normal(outputs, hidden) * 0.02
        prompt_PH = initial_prompt(normal_PH, config, start or StartTokens(), backbone, generator)
        self.prompt_embeddings = nn.Parameter(prompt_PH)
        self.intermediate_prompt_embeddings = None if deep is None else nn.Parameter(deep)
        self.score = None if score is None else nn.Parameter(score)

    @property
    def backbone(self) -> Backbone:
        return self._backbone[0]

    def forward(self, batch: Batch) -> torch.Tensor:
        """The batch's mean loss; `loss.backward()` fills the gradients of the parameters."""
        names, parameters = zip(*self.named_parameters(), strict=True)
        return _RunRequest.apply(self, batch, names, *parameters)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], rows: list[Sums] | None = None) -> Evaluation:
        """Exact over all rows, however they are divided into batches.

        rows: a list to which each row's sums are appended, as an evaluation of that row alone would
            give them, including its "loss"
        """
        loss, sums, first_loss = 0.0, Sums(), math.nan
        for batch in batches:
            by_row: dict[int, Sums] | None = None if rows is None else {}
            answer = self.answer(self.request(batch, needs_grad=False, by_row=by_row))
            if rows is not None and by_row is not None:
                rows += [by_row[row] for row in sorted(by_row)]
            first_loss = answer.loss if math.isnan(first_loss) else first_loss
            loss += answer.loss * self.task.targets(batch.labels)
            for name, value in answer.sums.items():
                sums[name] = sums.get(name, 0.0) + value
        loss /= sums["targets"]
        return Evaluation(loss, self.task.metrics(loss, sums), first_loss)

    def answer(self, request: Request) -> Answer:
        """The runner's answer, counted in `usage`."""
        began = time.monotonic()
        answer = self._run(request)
        usage, packs = self.usage, answer.packs
        usage.wait_s += time.monotonic() - began
        usage.rows += request.rows
        usage.tokens += request.rows * request.row_tokens
        usage.packs += packs.packs
        usage.pack_rows += packs.rows
        usage.pack_slots += packs.row_slots
        usage.requests += packs.requests
        usage.retries += packs.retries
        return answer

    def request(
        self, batch: Batch, *, needs_grad: bool, by_row: dict[int, Sums] | None = None
    ) -> Request:
        """The batch as a request for the packer, with this model's present prompts."""
        deep_LPH: torch.Tensor | None = None
        if self.intermediate_prompt_embeddings is not None:
            deep = self.intermediate_prompt_embeddings.detach()
            deep_LPH = deep.view(len(deep), self.backbone.num_blocks, -1).transpose(0, 1)
        score: torch.Tensor | None = None
        if self.score is not None:
            score = self.score.detach().requires_grad_(needs_grad)
        return Request(
            embeds_BTH=self.backbone.embed(batch.tokens_BT.to(self.backbone.device)).detach(),
            prompt_PH=self.prompt_embeddings.detach(),
            deep_LPH=deep_LPH,
            head=self._head(batch, score, by_row),
            head_parameters=() if score is None or not needs_grad else (score,),
            needs_grad=needs_grad,
        )

    def _head(
        self, batch: Batch, score_CH: torch.Tensor | None, by_row: dict[int, Sums] | None
    ) -> Head:
        backbone, task = self.backbone, self.task
        targets, labels = task.targets(batch.labels), batch.labels.to(backbone.device)

        def head(hidden_BTH: torch.Tensor, rows: slice) -> tuple[torch.Tensor, Sums]:
            if score_CH is None:
                outputs = backbone.logits(hidden_BTH)
            else:
                pooled_BH = last_token(hidden_BTH, batch.lengths_B[rows])
                outputs = pooled_BH.to(score_CH.dtype) @ score_CH.T
            loss, sums = task.loss_sum(outputs, labels[rows])
            if by_row is not None:  # a retry gives the same rows again
                for i in range(len(outputs)):
                    alone, counts = task.loss_sum(outputs[i : i + 1], labels[rows][i : i + 1])
                    by_row[rows.start + i] = {"loss": alone.item(), **counts}
            return loss / targets, sums

        return head


class _RunRequest(torch.autograd.Function):
    """Passes a batch to the runner, which computes loss and gradients in one go.

    The loss is a scalar, so backward only scales the gradients that forward has computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: PromptTunedModel,
        batch: Batch,
        names: tuple[str, ...],
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        answer = model.answer(model.request(batch, needs_grad=True))
        grads = {"prompt_embeddings": answer.prompt_PH}
        if answer.deep_LPH is not None:
            grads["intermediate_prompt_embeddings"] = answer.deep_LPH.transpose(0, 1).flatten(1)
        if answer.head_parameters:
            (grads["score"],) = answer.head_parameters
        ctx.grads = [grads[name] for name in names]
        return parameters[0].new_tensor(answer.loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *(grad_loss * grad for grad in ctx.grads)
