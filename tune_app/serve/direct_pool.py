"""A shorter way for tasks from a server's handler to the thread that computes them, and back.

In Petals each task carries a future, for which a file descriptor is passed between the processes,
and each tensor goes through a file in shared memory. That takes several milliseconds, more than a
token of a small model. Here small tensors go through the pipe itself, and one pipe for each handler
brings the answers back to its event loop.
"""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
import asyncio
import itertools
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

import tune_app.petals_compat  # noqa: F401
from petals.server.task_pool import PrioritizedTaskPool

# Larger tensors go through shared memory, because a pipe takes only 64 KiB before it is read.
_SMALL_BYTES = 32 * 2**10


@dataclass(order=True, frozen=True)
class _Task:
    priority: float
    submitted_at: float
    number: int
    handler: int = field(compare=False)  # id of its process
    args: tuple[Any, ...] = field(compare=False)


@dataclass(frozen=True)
class _Handler:
    """The first that a handler puts into the queue: where its answers go."""

    pid: int
    answers: Connection


@dataclass(frozen=True)
class _Small:
    """A tensor's values."""

    content: bytearray
    dtype: torch.dtype
    shape: tuple[int, ...]


def _packed(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach().cpu().contiguous()
    if tensor.nbytes > _SMALL_BYTES:
        return tensor
    content = bytearray(tensor.flatten().view(torch.uint8).numpy())
    return _Small(content, tensor.dtype, tuple(tensor.shape))


def _unpacked(value: Any, device: torch.device | None = None) -> Any:
    if isinstance(value, _Small):
        if not value.content:
            value = torch.empty(value.shape, dtype=value.dtype)
        else:
            value = torch.frombuffer(value.content, dtype=value.dtype).view(value.shape)
    if isinstance(value, torch.Tensor) and device is not None:
        value = value.to(device)
    return value


class DirectPool(PrioritizedTaskPool):
    """Petals' pool of one kind of tasks. Created in the server's process before its handlers."""

    def __init__(self, compute: Callable[..., Sequence[torch.Tensor]], **options: Any) -> None:
        """compute: returns the tensors of the answer; called in the server's computing thread"""
        super().__init__(self._run_task, **options)
        self._compute = compute
        self._answers_to: dict[int, Connection] = {}  # in the server: by the handler's process
        self._mine: _Answers | None = None  # in a handler

    # ---------------------------------------------------------------------------- in a handler

    def submit_task(self, *args: Any, priority: float = 0.0) -> asyncio.Future[list[torch.Tensor]]:
        """To be called in the handler's event loop, which also gets the answer."""
        if self._mine is None:
            reader, writer = multiprocessing.Pipe(duplex=False)
            self._mine = _Answers(reader)
            self.submitted_tasks.put(_Handler(os.getpid(), writer))
            writer.close()  # the server has a copy
        number, future = self._mine.expect()
        packed = tuple(map(_packed, args))
        task = _Task(priority, time.monotonic(), number, os.getpid(), packed)
        size = args[0].shape[0] * args[0].shape[1]
        if size > self.max_batch_size:
            self._mine.fail(number, ValueError(f"more than {self.max_batch_size} tokens: {size}"))
            return future
        self.submitted_tasks.put(task)
        self.batch_sender.send(None)  # the runtime counts these
        urgency = (priority, task.submitted_at)
        if urgency < self.priority:  # type: ignore[has-type]
            self.priority = urgency
        return future

    # -------------------------------------------------------------------------- in the server

    def run(self) -> None:
        """Sorts what the handlers put into the queue."""
        while (item := self.submitted_tasks.get()) is not None:
            if isinstance(item, _Handler):
                self._answers_to[item.pid] = item.answers
            else:
                self._ordered_tasks.put(item)

    def load_batch_to_runtime(
        self, timeout: float | None = None, device: torch.device | None = None
    ) -> tuple[int, list[_Task]]:
        task = self._ordered_tasks.get(timeout=timeout)
        self.batch_receiver.recv()
        if not self._ordered_tasks.empty():
            following = self._ordered_tasks.queue[0]
            self.priority = (following.priority, following.submitted_at)
        return task.number, [task]

    def _run_task(self, task: _Task) -> tuple[torch.Tensor]:
        """Computes and answers. Returns something only because the runtime wants its size."""
        try:
            args = (_unpacked(arg, self.device) for arg in task.args)
            answer: Any = [_packed(output) for output in self._compute(*args)]
        except Exception as error:
            self._answer(task, error)
            raise  # for the log
        self._answer(task, answer)
        return (torch.empty(0),)

    def _answer(self, task: _Task, answer: Any) -> None:
        if isinstance(answer, Exception):
            try:
                pickle.loads(pickle.dumps(answer))
            except Exception:
                answer = RuntimeError(repr(answer))
        with suppress(OSError):  # if the handler has ended, so does the server
            self._answers_to[task.handler].send((task.number, answer))

    def send_outputs_from_runtime(self, uid: int, batch_outputs: Any) -> None:
        pass  # `_run_task` has answered

    def send_exception_from_runtime(self, uid: int, exception: BaseException) -> None:
        pass


class _Answers:
    """What a handler waits for."""

    def __init__(self, reader: Connection) -> None:
        self._reader, self._numbers = reader, itertools.count()
        self._futures: dict[int, asyncio.Future[list[torch.Tensor]]] = {}
        asyncio.get_running_loop().add_reader(reader.fileno(), self._read)
        # uvloop makes it non-blocking, and then a message of which only a part is there would fail.
        os.set_blocking(reader.fileno(), True)

    def expect(self) -> tuple[int, asyncio.Future[list[torch.Tensor]]]:
        number = next(self._numbers)
        self._futures[number] = asyncio.get_running_loop().create_future()
        return number, self._futures[number]

    def fail(self, number: int, error: Exception) -> None:
        self._futures.pop(number).set_exception(error)

    def _read(self) -> None:
        number, answer = self._reader.recv()
        future = self._futures.pop(number)
        if future.done():  # cancelled
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result([_unpacked(output) for output in answer])
