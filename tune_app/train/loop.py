"""The training loop of one trial: plain PyTorch that works in a debugger and reports to a
callback."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tune_app.run.search_config import TrialConfig
from tune_app.run.trial_report import Report, Usage, evaluation_steps
from tune_app.tasks.base import Sums
from tune_app.tasks.data import Batch, DataOrder, Dataset, TaskData
from tune_app.tasks.objectives import LOSS, Objective
from tune_app.train.checkpoint import pack, read_state
from tune_app.train.optim import build_optimizer, build_scheduler, change
from tune_app.train.prompt_model import Evaluation, PromptTunedModel

EVALUATION_ROWS = 128  # batch size of evaluations
# A trial whose loss reaches this many times the first one has diverged, and counts as having that
# loss: it is finite, so that the sampler learns from it, and no run that still trains is worse.
EXPLODED = 10.0
# Nats; replaces a first loss that is not a number: a uniform guess over 22,000 tokens.
UNKNOWN_LOSS = 10.0


def evaluation_batches(
    data: Dataset, batch_size: int, most: int | None = None, first: int = 0
) -> list[Batch]:
    """The rows of a split from the `first` (0) to the first `most` (None: all)."""
    rows = len(data) if most is None else min(most, len(data))
    return [
        data.batch(range(start, min(start + batch_size, rows)))
        for start in range(first, rows, batch_size)
    ]


class TrainingRun:
    """Model, optimizer, schedule and position in the data: everything that a checkpoint needs.

    phase: of a config with changes, what applies at the current step
    """

    def __init__(
        self,
        model: PromptTunedModel,
        data: TaskData,
        config: TrialConfig,
        objective: Objective = LOSS,
    ) -> None:
        self.model, self.data, self.config, self.objective = model, data, config, objective
        self.phase = config.at(0)
        self.optimizer = build_optimizer(model.parameters(), self.phase)
        self.scheduler = build_scheduler(self.optimizer, self.phase)
        self.order = DataOrder(len(data.train), config.batch_size, config.seed)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.first_loss: float | None = None
        self.last_report: Report | None = None

    def train(
        self,
        report: Callable[[Report], None],
        *,
        evaluate_on_the_way: bool = True,
        deciding: Collection[int] | None = None,
    ) -> None:
        """Trains from the current step to the last one; ends early if the loss diverges.

        `report` is called after every evaluation, when `state()` is consistent. A run that resumes
        from a checkpoint first repeats its last report, which may have been lost in a kill.
        reduce_lr_on_plateau is always evaluated on the way, because its schedule needs the losses.

        deciding: the steps whose evaluations take all rows that trials are compared on; the others
            take the few that `TaskData.glimpse` says. None: all do.
        """
        if self.last_report is not None:
            report(self.last_report)
            if self.last_report.diverged:
                return
        began = time.monotonic() - self.seconds
        evaluations = evaluation_steps(self.config.steps)
        phases = self.config.phases().values()
        looks = any(phase.scheduler == "reduce_lr_on_plateau" for phase in phases)
        if not evaluate_on_the_way and not looks:
            evaluations = evaluations[-1:]
        judged, glimpse = self.data.judged, self.data.glimpse
        if looks or glimpse is None:
            deciding = None
        few = evaluation_batches(judged, EVALUATION_ROWS, glimpse)
        others = evaluation_batches(judged, EVALUATION_ROWS, first=glimpse or len(judged))
        losses: list[float] = []
        while self.step < self.config.steps:
            self._begin_phase(self.step)
            batch = self.data.train.batch(self.order.indices(self.step))
            learning_rate = self.optimizer.param_groups[0]["lr"]
            losses.append(self._train_step(batch))
            # The mean, because a single batch may be ten times as hard as the first one.
            diverged = self._has_diverged(sum(losses) / len(losses))
            if self.step in evaluations or diverged:
                is_whole = diverged or deciding is None or self.step in deciding
                rows = [*few, *others] if is_whole else few
                evaluation = self.model.evaluate(rows)
                diverged = diverged or self._has_diverged(evaluation.loss)
                if isinstance(self.scheduler, ReduceLROnPlateau) and not diverged:
                    self.scheduler.step(evaluation.loss)
                self.seconds = time.monotonic() - began
                self.last_report = self._report(
                    evaluation,
                    train_loss=sum(losses) / len(losses),
                    learning_rate=learning_rate,
                    diverged=diverged,
                    glimpsed=None if deciding is None else rows,
                )
                report(self.last_report)
                losses = []
            if diverged:
                return

    def _report(
        self,
        evaluation: Evaluation,
        *,
        train_loss: float,
        learning_rate: float,
        diverged: bool,
        glimpsed: Sequence[Batch] | None,
    ) -> Report:
        """glimpsed: the evaluated rows, in a run whose evaluations are not all on the same ones."""
        metrics = self.model.usage.flat() | evaluation.metric
        if glimpsed is not None:
            metrics["eval_rows"] = sum(len(batch.lengths_B) for batch in glimpsed)
            metrics["glimpse_loss"] = evaluation.first_loss
        return Report(
            step=self.step,
            train_loss=train_loss,
            eval_loss=evaluation.loss,
            objective=self._cost(evaluation, diverged),
            learning_rate=learning_rate,
            tokens=self.tokens,
            seconds=self.seconds,
            diverged=diverged,
            metrics=metrics,
        )

    def _begin_phase(self, step: int) -> None:
        """Applies the config's changes after this step, if there are any."""
        phase = self.config.at(step)
        if phase != self.phase:
            self.phase, self.scheduler = phase, change(self.optimizer, phase, step)

    def _train_step(self, batch: Batch) -> float:
        loss = self.model(batch)
        loss.backward()
        if self.phase.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.phase.max_grad_norm)
        self.optimizer.step()
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += int(batch.lengths_B.sum()) + len(batch.lengths_B) * self.config.prompt_length
        return loss.item()

    def _has_diverged(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if self.first_loss is None:
            self.first_loss = loss
        return loss > EXPLODED * self.first_loss

    def _cost(self, evaluation: Evaluation, diverged: bool) -> float:
        """What the search minimises."""
        if diverged:
            first_loss = UNKNOWN_LOSS if self.first_loss is None else self.first_loss
            return self.objective.penalty(EXPLODED * first_loss)
        return self.objective.cost(self.objective.of(evaluation.loss, evaluation.metric))

    def state(self) -> bytes:
        """A checkpoint: trained parameters, optimizer, schedule, position; no frozen weights."""
        state = {
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "first_loss": self.first_loss,
            "usage": asdict(self.model.usage),
            "last_report": None if self.last_report is None else self.last_report.flat(),
        }
        return pack(state)

    def load_state(self, checkpoint: bytes) -> None:
        """Resumes from `state()`, with the losses of a run that was never interrupted."""
        state = read_state(checkpoint, self.model.backbone.device)
        self.model.load_state_dict(state["model"])
        self._begin_phase(state["step"] - 1)  # a change after its last step comes later
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.first_loss = state["first_loss"]
        self.model.usage = Usage(**state["usage"])
        if state["last_report"] is not None:
            self.last_report = Report.from_flat(state["last_report"])

    def take_over(self, checkpoint: bytes, spent: bytes | None) -> None:
        """Continues from the `state()` of another run, whose config is the start of this one's.

        spent: this run's discarded `state()`, whose cost still counts
        """
        self.load_state(checkpoint)
        if spent is None or self.last_report is None:
            return
        state = read_state(spent)
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.model.usage = usage = Usage(**state["usage"])
        self.last_report = replace(
            self.last_report,
            tokens=self.tokens,
            seconds=self.seconds,
            metrics={**self.last_report.metrics, **usage.flat()},
        )


def test_metrics(
    model: PromptTunedModel,
    data: TaskData,
    rows: list[Sums] | None = None,  # noqa: PT028 (not a test)
) -> dict[str, float]:
    """Loss and metrics over the whole test split, which no trial of the search has seen.

    rows: a list to which each row's sums are appended, see `PromptTunedModel.evaluate`
    """
    evaluation = model.evaluate(evaluation_batches(data.test, EVALUATION_ROWS), rows)
    return {"test_loss": evaluation.loss} | {
        f"test_{name}": value for name, value in evaluation.metric.items()
    }
