"""What is known about the data before training, for people and for the run's events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from tune_app.run.typed import well_typed
from tune_app.tasks.base import Scale, Task

if TYPE_CHECKING:
    from tune_app.tasks.data import Dataset


@dataclass(frozen=True)
class DataSummary:
    """A run's data in numbers; part of the `search_started` event.

    rows: split ("train", "valid", "test") -> its rows
    judged: how many validation rows trials are compared on
    class_names: by class index; empty if labels are not classes
    class_counts: split -> rows of each class, by class index; empty like class_names
    constant_answer: the one answer that the training rows suggest (the most frequent class, the
        mean number); "" if rows have no labels
    constant: split, or "judged" -> the task's metric of always giving that answer (such as the
        accuracy of the most frequent class), NaN if undefined; empty if rows have no labels
    scale: how labels that are numbers were standardised
    columns: split -> which of its columns is what, in words; empty if there are no columns
    """

    rows: dict[str, int]
    judged: int
    class_names: tuple[str, ...] = ()
    class_counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constant_answer: str = ""
    constant: dict[str, float] = field(default_factory=dict)
    scale: Scale | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `from_dict` takes, ready for JSON."""
        return asdict(self)

    def in_words(self, metric: str) -> list[str]:
        """Lines for the terminal: rows, columns, classes, and how good a constant answer is."""
        rows = ", ".join(f"{amount:,} {split}" for split, amount in self.rows.items())
        lines = [f"rows: {rows}"]
        for columns in dict.fromkeys(self.columns.values()):
            lines.append(f"columns: {columns}")
        if self.class_names:
            most = sorted(zip(self.class_counts["train"], self.class_names, strict=True))[::-1]
            more = f", and {len(most) - 12} more" if len(most) > 12 else ""
            named = ", ".join(f"{name} {amount:,}" for amount, name in most[:12])
            lines.append(f"{len(most)} classes in train: {named}{more}")
        reached = ", ".join(
            f"{round(self.constant[split], 3) + 0:.3f} on {split}"
            for split in ("valid", "test")
            if split in self.constant
        )
        if reached:
            lines.append(f"always answering {self.constant_answer!r}: {metric} {reached}")
        return lines

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any] | None) -> DataSummary | None:
        """The summary in an event; None in a run that was made before there were summaries.

        Raises TypeError, ValueError or AttributeError if the mapping is not a summary.
        """
        if not mapping:
            return None
        known = {known.name for known in fields(cls)}
        values = {name: value for name, value in mapping.items() if name in known}
        values["class_names"] = tuple(values.get("class_names", ()))
        counts = values.get("class_counts", {})
        values["class_counts"] = {split: tuple(rows) for split, rows in counts.items()}
        if values.get("scale") is not None:
            values["scale"] = Scale(**values["scale"])
            if len(well_typed(Scale, vars(values["scale"]))) < len(fields(Scale)):
                raise TypeError("scale needs numbers")
        if odd := values.keys() - well_typed(cls, values).keys():
            raise TypeError(f"of another type: {', '.join(sorted(odd))}")
        summary = cls(**values)
        if bool(summary.class_counts) != bool(summary.class_names):
            raise ValueError("class_names and class_counts belong together")
        if summary.class_counts and "train" not in summary.class_counts:
            raise ValueError("class_counts lacks the training rows")
        for split, rows in summary.class_counts.items():
            if len(rows) != len(summary.class_names) or min(rows) < 0 or not any(rows):
                raise ValueError(f"{split} needs the rows of each class")
        return summary


@dataclass(frozen=True)
class DataFacts:
    """What a search needs to know about the data that its hosts have loaded.

    fingerprint: of the tokenised rows and labels of all splits
    notes: for the user, such as how many texts were cut
    """

    summary: DataSummary
    fingerprint: str
    notes: tuple[str, ...]


def summarise(
    task: Task,
    splits: Mapping[str, Dataset],
    class_names: tuple[str, ...],
    scale: Scale | None,
    columns: Mapping[str, str],
) -> DataSummary:
    """The summary of the tokenised splits, and of "judged", the sample of validation rows."""
    counts: dict[str, tuple[int, ...]] = {}
    constant: dict[str, float] = {}
    train_N, answer = splits["train"].labels_N, ""
    for split, rows in splits.items():
        if rows.labels_N is None or train_N is None:
            continue
        if class_names:
            counts[split] = tuple(rows.labels_N.bincount(minlength=len(class_names)).tolist())
        if task.constant is not None:
            constant[split] = task.constant(train_N, rows.labels_N)
    if class_names:
        answer = class_names[counts["train"].index(max(counts["train"]))]
    elif scale is not None:
        answer = f"{scale.mean:.4g}"
    return DataSummary(
        rows={split: len(rows) for split, rows in splits.items() if split != "judged"},
        judged=len(splits["judged"]),
        class_names=class_names,
        class_counts=counts,
        constant_answer=answer,
        constant=constant,
        scale=scale,
        columns=dict(columns),
    )
