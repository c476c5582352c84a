"""From texts to rows of tokens, and how many of them were cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tune_app.run.search_config import ConfigError
from tune_app.tasks.base import Task
from tune_app.tasks.readers import Texts
from tune_app.tasks.splits import Rows


@dataclass
class SplitLengths:
    """Tokens of each text of a split before cutting, and how many rows were dropped."""

    tokens: list[int] = field(default_factory=list)
    dropped: int = 0
    completions_cut: int | None = None  # None if rows have no completions


@dataclass
class Lengths:
    """The effect of cutting to `max_length`."""

    max_length: int
    splits: dict[str, SplitLengths] = field(default_factory=dict)

    def of(self, split: str) -> SplitLengths:
        return self.splits.setdefault(split, SplitLengths())

    @property
    def cut(self) -> dict[str, tuple[int, int]]:
        """Split -> (texts that were cut, all)."""
        return {
            split: (sum(length > self.max_length for length in known.tokens), len(known.tokens))
            for split, known in self.splits.items()
            if known.tokens
        }

    @property
    def of_a_twentieth(self) -> int | None:
        """The smallest max_length that cuts at most a twentieth of all texts; None without
        texts."""
        lengths = sorted(n for known in self.splits.values() for n in known.tokens)
        return lengths[len(lengths) - 1 - len(lengths) // 20] if lengths else None

    def notes(self) -> list[str]:
        """One sentence for each split in which texts were cut or dropped."""
        notes = []
        for split, (longer, texts) in self.cut.items():
            if longer:
                cut = self.splits[split].completions_cut
                how = (
                    "were cut"
                    if cut is None
                    else f"lost the beginning of their prompt, and {cut} the end of the completion"
                )
                notes.append(
                    f"{longer} of {texts} {split} texts are longer than --max-length "
                    f"{self.max_length} and {how}"
                )
        if 20 * sum(cut for cut, _ in self.cut.values()) > sum(n for _, n in self.cut.values()):
            notes[-1] += f" (--max-length {self.of_a_twentieth} would cut only 5 %)"
        for split, known in self.splits.items():
            if known.dropped:
                notes.append(
                    f"{known.dropped} {split} texts are too short to learn from and were dropped"
                )
        return notes


def tokenise(part: Texts, task: Task, limit: int, tokenizer: Any, lengths: SplitLengths) -> Rows:
    """Rows of at most `limit` tokens; the effect of cutting is added to `lengths`."""
    if part.completions is not None or part.chats is not None:
        return _taught(part, limit, tokenizer, lengths)
    # verbose: no warning about the model's longest input, because rows are cut below
    ids = tokenizer(part.texts, add_special_tokens=True, verbose=False)["input_ids"]
    if part.is_stream:
        stream = ids[0]
        tokens = [tuple(stream[i : i + limit]) for i in range(0, len(stream), limit)]
    else:
        tokens = [tuple(row[:limit]) for row in ids]
        lengths.tokens += [len(row) for row in ids]
    # a language model learns from the second token of a row on
    least = 2 if task.unit == "token" else 1
    kept = [i for i, row in enumerate(tokens) if len(row) >= least]
    if not part.is_stream:
        lengths.dropped += len(tokens) - len(kept)
    return Rows(tokens, part.labels).keep(kept)


def _taught(part: Texts, limit: int, tokenizer: Any, lengths: SplitLengths) -> Rows:
    """Prompts with completions; only the completions count in the loss.

    A row that is too long loses the beginning of its prompt, up to all but one token, and only then
    the end of its completion. Prompt and completion are tokenised separately, because in use the
    prompt comes alone; the end token after the completion teaches where to stop.
    """
    prompts, completions = part.texts, part.completions or []
    if part.chats is not None:
        pairs = [_rendered(chat, tokenizer) for chat in part.chats]
        prompts, completions = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    options = {"verbose": False}
    # A chat template adds special tokens itself.
    begins = tokenizer(prompts, add_special_tokens=part.chats is None, **options)["input_ids"]
    ends = tokenizer(completions, add_special_tokens=False, **options)["input_ids"]
    end = tokenizer.eos_token_id
    rows, learned_from = list[tuple[int, ...]](), list[int]()
    lengths.completions_cut = lengths.completions_cut or 0
    for begin, rest in zip(begins, ends, strict=True):
        if end is not None and begin[-1:] == [end] and len(begin) > 1:
            begin = begin[:-1]  # some tokenizers end every text
        if end is not None and part.chats is None:
            rest = [*rest, end]
        lengths.tokens.append(len(begin) + len(rest))
        if not begin or not rest or limit < 2:
            lengths.dropped += 1
            continue
        lengths.completions_cut += len(rest) > limit - 1
        rest = rest[: limit - 1]
        begin = begin[-(limit - len(rest)) :]
        rows.append((*begin, *rest))
        learned_from.append(len(begin))
    return Rows(rows, None, learned_from)


def _rendered(chat: list[dict[str, str]], tokenizer: Any) -> tuple[str, str]:
    """(the chat up to the last answer, that answer) as the model's own template writes them.

    Raises ConfigError if it has no template, or one that does not accept such chats.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "--model: has no chat template, which messages need; use a model that was tuned for "
            "chats, or give --prompt-column and --completion-column."
        )
    try:
        prompt: str = tokenizer.apply_chat_template(
            chat[:-1], tokenize=False, add_generation_prompt=True
        )
        whole: str = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # the template's own words, such as that roles must alternate
        raise ConfigError(f"--model: its chat template refuses a chat: {error}") from error
    if not whole.startswith(prompt):
        raise ConfigError(
            "--model: its chat template changes the prompt once there is an answer, so the two "
            "cannot be separated; give --prompt-column and --completion-column."
        )
    return prompt, whole[len(prompt) :]
