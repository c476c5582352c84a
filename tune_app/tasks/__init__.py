"""The two tasks and their data: `load_task_data`, and a module of losses and metrics each."""

from tune_app.tasks.data import IGNORED, Batch, DataOrder, Dataset, TaskData
from tune_app.tasks.loading import load_task_data

__all__ = ["IGNORED", "Batch", "DataOrder", "Dataset", "TaskData", "load_task_data"]
