"""Applies tuned prompts: predicts classes or numbers, completes texts, and evaluates.

Shapes: see `backbones/protocol.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tune_app.apply.generation import Sampling, chooser, continuation
from tune_app.apply.logits import class_probabilities, row_scores
from tune_app.apply.prompts_folder import ABOUT, About, read_weights
from tune_app.backbones.packer import run_alone
from tune_app.models.folder import end_tokens, model_folder, positions
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.tasks.base import Task
from tune_app.tasks.data import Dataset
from tune_app.tasks.known import task_named
from tune_app.train.loop import EVALUATION_ROWS, evaluation_batches
from tune_app.train.one_process import open_alone
from tune_app.train.prompt_model import Evaluation, PromptTunedModel


@dataclass(frozen=True)
class Prompts:
    """Tuned prompts on an open backbone.

    most_positions: None if the model has no limit
    end_tokens: tokens that end a text
    """

    about: About
    model: PromptTunedModel
    tokenizer: Any
    most_positions: int | None
    end_tokens: frozenset[int]

    @property
    def task(self) -> Task:
        return self.model.task

    def evaluate(self, rows: Dataset) -> Evaluation:
        """Loss and metrics over all rows, computed as on a search's test split; for completions
        also the share that greedy generation reproduces exactly, apart from surrounding white
        space."""
        evaluation = self.model.evaluate(evaluation_batches(rows, EVALUATION_ROWS))
        if not len(rows) or rows.completion(0) is None:
            return evaluation
        exact = sum(
            self._is_generated(*pair) for i in range(len(rows)) if (pair := rows.completion(i))
        )
        return replace(evaluation, metric=evaluation.metric | {"exact_match": exact / len(rows)})

    def _is_generated(self, prompt: list[int], completion: list[int]) -> bool:
        found = list[int]()
        for token in continuation(self.model, prompt, len(completion), chooser(None)):
            if token in self.end_tokens:
                break
            found.append(token)
        wanted, found_text = (
            self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            for ids in (completion, found)
        )
        return bool(wanted == found_text)

    def classify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """(class name, its probability) for each text, cut to the length of training."""
        most_B, classes_B = class_probabilities(self.model, self._rows(texts)).max(-1)
        names = self.about.class_names
        return [(names[i], most) for i, most in zip(classes_B, most_B.tolist(), strict=True)]

    def answers(self, texts: Sequence[str]) -> list[str]:
        """One line for each text, cut to the length of training: class, tab and probability, or a
        number, depending on the task."""
        if self.task.answer is None:
            raise ValueError(f"prompts for {self.task.name} complete texts")
        scores_BC = row_scores(self.model, self._rows(texts))
        return self.task.answer(scores_BC, self.about.class_names, self.about.scale)

    def complete(
        self, text: str, max_new_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Yields the continuation piece by piece, up to an end-of-text token; greedy without
        `sampling`. Raises ConfigError if the model has too few positions.
        """
        (ids,) = self._tokens([text])
        prompt, tokenizer = self.about.config.prompt_length, self.tokenizer
        needed = prompt + len(ids) + max_new_tokens
        if self.most_positions is not None and needed > self.most_positions:
            raise ConfigError(
                f"--max-new-tokens: {prompt} prompt, {len(ids)} text and {max_new_tokens} new "
                f"tokens are {needed} positions; the model has {self.most_positions}."
            )
        # Decodes the whole text each time: a single piece would lose a leading space, or be half a
        # character.
        done = tokenizer.decode(ids, skip_special_tokens=True)
        for token in continuation(self.model, ids, max_new_tokens, chooser(sampling)):
            if token in self.end_tokens:
                return
            ids.append(token)
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            if not whole.endswith("\N{REPLACEMENT CHARACTER}"):
                yield whole[len(done) :]
                done = whole

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids[: self.about.max_length] for ids in self._tokens(texts)]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), verbose=False)["input_ids"]
        if not all(ids):
            raise ConfigError("a text must not be empty.")
        return ids


def _fill(model: PromptTunedModel, folder: Path) -> None:
    """Raises ConfigError where the weights are not those that prompts.json describes."""
    weights = read_weights(folder)
    told = {name: [*tensor.shape] for name, tensor in model.state_dict().items()}
    found = {name: [*tensor.shape] for name, tensor in weights.items()}
    if told != found:
        raise ConfigError(
            f"{folder}: its weights are not those that {ABOUT} describes ({told}), got {found}; "
            "copy the whole folder, or export it again."
        )
    model.load_state_dict(weights)


@contextmanager
def open_prompts(
    folder: Path, about: About, config: SearchConfig, *, progress: Callable[[str], None]
) -> Iterator[Prompts]:
    """The prompts in `folder` on the config's backbone; see `open_alone`."""
    with open_alone(config, progress=progress) as (backbone, tokenizer):
        run = partial(run_alone, backbone)
        task = task_named(about.task)
        # The initialisation does not matter, because the prompts are replaced immediately.
        trial = replace(about.config, init="normal", deep_init="normal")
        model = PromptTunedModel(backbone, run, task, task.outputs(about.class_names), trial)
        _fill(model, folder)
        files = model_folder(config.model, config.revision)
        ends = frozenset({tokenizer.eos_token_id, *end_tokens(files)})
        yield Prompts(about, model, tokenizer, positions(files), ends)
