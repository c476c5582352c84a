"""What every arm of the benchmark trains: the same trials on the same rows in the same order."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import optuna

from tune_app.models.folder import model_folder
from tune_app.run.search_config import BackboneKind, SearchConfig, TrialConfig
from tune_app.study.samplers import build_sampler
from tune_app.study.space import SearchSpace
from tune_app.study.yaml_space import load_space
from tune_app.tasks.stdlib_text import docstring_packages

REQUEST_TOKENS = 4096  # half of what the servers take
VALID_ROWS = 4  # of an evaluation; few, so that the training rows decide
_SPACE = Path(__file__).parent / "space.yaml"


@dataclass(frozen=True)
class Workload:
    """`trials` runs of `steps` steps; each row is `text_tokens` of text and a prompt.

    folder: holds the data files that `write_data` makes
    peers: of the swarm; none for the local backbone
    """

    folder: str
    backbone: BackboneKind = "local"
    peers: tuple[str, ...] = ()
    task: str = "classification"
    trials: int = 24
    steps: int = 40
    rows: int = 4
    text_tokens: int = 32
    prompt_tokens: int = 8

    @property
    def model(self) -> Path:
        return model_folder("demo")

    @property
    def training_rows(self) -> int:
        """Rows that all trials together train on."""
        return self.trials * self.steps * self.rows

    @property
    def space(self) -> SearchSpace:
        return load_space(str(_SPACE))

    def search_config(self, concurrency: int, out: Path | None = None) -> SearchConfig:
        """The search as the command would run it: no early stopping, nothing confirmed.

        Random suggestions do not depend on results, so every arm can have the same ones.
        """
        return SearchConfig(
            space=str(_SPACE),
            task=self.task,
            train=f"{self.folder}/train.jsonl",
            valid=f"{self.folder}/valid.jsonl",
            text_column="text",
            label_column="label" if self.task == "classification" else None,
            backbone=self.backbone,
            peers=self.peers,
            request_tokens=REQUEST_TOKENS if self.peers else None,
            prompt_length=self.prompt_tokens,
            trials=self.trials,
            concurrency=concurrency,
            steps=self.steps,
            batch_size=self.rows,
            max_length=self.text_tokens,
            device="cpu",
            out=out,
            scheduler="none",
            sampler="random",
            confirm=0,
            quiet=True,
        )

    def trial_configs(self) -> list[TrialConfig]:
        """What the search suggests, in the order of the trials' numbers."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        config, space = self.search_config(1), self.space
        base = config.base_trial()
        study = optuna.create_study(sampler=build_sampler(config.sampler, space, config.seed))
        for first in space.first_trials(base, None):
            first.enqueue(study)
        configs = []
        for _ in range(self.trials):
            trial = study.ask()
            constants = space(trial) or {}
            configs.append(space.trial_config({**trial.params, **constants}, base))
        return configs

    def data(self) -> Any:
        """The tokenised splits (TaskData), as the search itself loads them."""
        from transformers import AutoTokenizer

        from tune_app.tasks.loading import load_task_data

        return load_task_data(self.search_config(1), AutoTokenizer.from_pretrained(self.model))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        return cls(**values | {"peers": tuple(values["peers"])})


def write_data(folder: Path, least_characters: int = 300) -> None:
    """train.jsonl and valid.jsonl: built-in docstrings, long enough for rows of one length.

    least_characters: a docstring of 300 characters has more than 32 tokens of the demo model.
    """
    splits = docstring_packages()
    for split, most in (("train", None), ("valid", VALID_ROWS)):
        texts, labels = splits[split]
        rows = [
            json.dumps({"text": text, "label": label})
            for text, label in zip(texts, labels, strict=True)
            if len(text) >= least_characters
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(rows[:most]) + "\n")
