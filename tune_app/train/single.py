"""One config trained alone, as a run of one trial that the other commands can use like any run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from tune_app.run.event_log import EventLog
from tune_app.run.events import SearchEnded, SearchStarted, TrialEnded, TrialReported, TrialStarted
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.search_config import SearchConfig, TrialConfig
from tune_app.run.trial_report import Report, outcome
from tune_app.train.one_process import Terminal, open_alone

if TYPE_CHECKING:
    from tune_app.backbones.packing import Answer, Request
    from tune_app.tasks.data import TaskData

_TRIAL = 1  # number 0 is the documented default of a search


def train_single(
    config: SearchConfig,
    trial: TrialConfig,
    run: RunDir,
    terminal: Terminal,
    reported: Callable[[Report, TaskData], None],
) -> tuple[Status, str]:
    """How the training ended, and why. `reported` is called after each evaluation; the last report
    has the results on the test split. Raises ConfigError and PrivateSwarmError."""
    with open_alone(config, progress=terminal.progress) as (backbone, tokenizer):
        from tune_app.backbones.packer import run_alone
        from tune_app.backbones.protocol import BackboneUnavailable
        from tune_app.tasks.loading import load_task_data
        from tune_app.train.loop import TrainingRun, test_metrics
        from tune_app.train.prompt_model import PromptTunedModel

        terminal.progress("reading the data")
        data = load_task_data(config, tokenizer)
        terminal.say(f"run directory: {run.path}")
        for note in data.notes:
            terminal.say(f"note: {note}")

        def run_request(request: Request) -> Answer:
            terminal.passing(f"step {training.step} of {trial.steps} ...")
            return run_alone(backbone, request)

        model = PromptTunedModel(backbone, run_request, data.task, data.outputs, trial, data.start)
        training, log = TrainingRun(model, data, trial), EventLog(run)

        def report(report: Report) -> None:
            run.write_atomic(run.checkpoint(_TRIAL) / "state.pt", training.state())
            last = report.step == trial.steps and not report.diverged
            tested = test_metrics(model, data) if last else {}
            report = replace(report, metrics={**report.metrics, **tested})
            log.record(TrialReported(trial=_TRIAL, report=report))
            reported(report, data)

        settings = replace(config, trial=trial.to_dict())
        run.write_atomic(run.search_yaml, settings.to_yaml())
        log.record(
            SearchStarted(
                trials=1,
                task=data.task.name,
                metric=data.task.metric,
                classes=tuple(data.class_names),
                data=data.summary.to_dict(),
                fingerprint=data.fingerprint,
            )
        )
        try:
            log.record(TrialStarted(trial=_TRIAL, origin="enqueued", config=trial))
            training.train(report)
        except BackboneUnavailable as error:
            status, reason = Status.FAILED, f"after step {training.step}: {error}"
        except KeyboardInterrupt:
            log.record(SearchEnded(reason="interrupted"))
            raise
        else:
            status, reason = outcome(training.last_report, trial.steps)
        log.record(TrialEnded(trial=_TRIAL, status=status, reason=reason))
        log.record(SearchEnded())
    return status, reason
