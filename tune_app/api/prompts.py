"""Tuned prompts from Python: `load_prompts`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tune_app.api.given import named_as_arguments
from tune_app.apply.export import export_best
from tune_app.apply.inference import Prompts, open_prompts
from tune_app.apply.prompts_folder import ABOUT, About, read_about
from tune_app.models.folder import model_folder
from tune_app.models.identity import ModelIdentity
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import DATA, ConfigError, SearchConfig, settings_under
from tune_app.search.checks import check_everything
from tune_app.tasks.evaluation_file import load_evaluation_file


def load_prompts(
    folder: str | Path,
    *,
    model: str | None = None,
    backbone: str | None = None,
    peers: Sequence[str] = (),
    device: str | None = None,
) -> TunedPrompts:
    """The prompts of a run, or in a folder of prompts, on the model they were tuned for.

    model: the same model in another place; backbone, peers, device: as of the commands, and as in
        the search where they are not given. A private swarm is started where that was one.
    Raises ConfigError where they cannot be used.
    """
    with named_as_arguments():
        folder = _prompts_folder(RunDir(folder))
        about = read_about(folder)
        unset: dict[str, Any] = dict.fromkeys(settings_under(DATA))
        config = replace(about.search_config(), **unset)
        if backbone == "local":
            config = replace(config, peers=())
        elif peers:
            config = replace(config, backbone="swarm", peers=tuple(peers))
        if model is not None:
            config = replace(config, revision=None)
        told: dict[str, Any] = {"model": model, "backbone": backbone, "device": device}
        config = replace(config, **{k: v for k, v in told.items() if v is not None})
        check_everything(replace(config, prompt_length=about.config.prompt_length))
        here = ModelIdentity.of(
            config.model, model_folder(config.model, config.revision), config.revision
        )
        if refusal := about.model.refusal(here):
            raise ConfigError(refusal)
        return TunedPrompts(folder, about, config)


class TunedPrompts:
    """Prompts on an open backbone: close it, or use it in a `with` block."""

    def __init__(self, folder: Path, about: About, config: SearchConfig) -> None:
        self.about, self._config = about, config
        self._stack = ExitStack()
        opened = open_prompts(folder, about, config, progress=lambda _: None)
        self._prompts: Prompts = self._stack.enter_context(opened)

    def classify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """(class, its probability) for each text."""
        self._needs("classification")
        return self._prompts.classify(texts) if len(texts) else []

    def complete(self, text: str, max_new_tokens: int = 40) -> str:
        """What comes after the text: greedy, up to the end-of-text token."""
        self._needs("causal-lm")
        with named_as_arguments():
            return "".join(self._prompts.complete(text, max_new_tokens))

    def evaluate(
        self, data: Any, *, text_column: str | None = None, label_column: str | None = None
    ) -> dict[str, float]:
        """Loss and metric over all rows of a path, a DataFrame, or an object with `to_pandas()`."""
        with named_as_arguments():
            rows, _ = load_evaluation_file(
                str(data) if isinstance(data, Path) else data,
                replace(self._config, text_column=text_column, label_column=label_column),
                self._prompts.tokenizer,
                self.about.class_names,
                self.about.scale,
            )
        evaluation = self._prompts.evaluate(rows)
        return {"loss": evaluation.loss, **evaluation.metric}

    def close(self) -> None:
        """Closes the backbone, and ends a private swarm."""
        self._stack.close()

    def __enter__(self) -> TunedPrompts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _needs(self, task: str) -> None:
        if self.about.task != task:
            raise ValueError(f"these prompts are for {self.about.task}, not for {task}")


def _prompts_folder(run: RunDir) -> Path:
    if (run.path / ABOUT).is_file():
        return run.path
    if run.prompts_json.is_file():
        return run.prompts
    prompts = export_best(run) if run.events_jsonl.is_file() else None
    if prompts is None:
        raise ConfigError(f"{str(run.path)!r} holds neither prompts nor a run that has found any.")
    return prompts
