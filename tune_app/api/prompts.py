"""Tuned prompts from Python: `load_prompts`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tune_app.api.given import named_as_arguments
from tune_app.apply.inference import Prompts, open_prompts
from tune_app.apply.opening import check_model, find_prompts, opening_config
from tune_app.apply.prompts_folder import About, read_about
from tune_app.run.search_config import SearchConfig
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

    model: where the model is on this machine
    backbone, peers, device: as in the commands; by default as in the search, with a private swarm
        if the search had one
    Raises ConfigError if they cannot be used.
    """
    with named_as_arguments():
        folder = find_prompts(folder)
        about = read_about(folder)
        config = opening_config(about, model=model, backbone=backbone, peers=peers, device=device)
        check_everything(replace(config, prompt_length=about.config.prompt_length))
        check_model(about, config)
        return TunedPrompts(folder, about, config)


class TunedPrompts:
    """Prompts on an open backbone. Close them, or use them in a `with` block."""

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
        """The continuation of the text: greedy, up to the end-of-text token."""
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
