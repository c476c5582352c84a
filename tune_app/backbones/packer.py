"""Collects requests from many trial threads and runs them in shared packs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tune_app.backbones.packing import Answer, Part, Request, plan, run_parts
from tune_app.backbones.protocol import Backbone

# How long a worker waits for one more request before it starts a pack: a tenth of a recent pack's
# duration, clamped to 4-20 ms, and at most twice that in total. That covers a trial's optimizer
# step or checkpoint write; the upper clamp keeps one slow pack from delaying all later ones.
_LINGER_SHARE = 0.1
_LINGER_S, _LONGEST_LINGER_S = 0.004, 0.02
# An evaluation yields to at most this many training packs. On a swarm, 2 cuts the number of packs
# by a quarter compared with 0; 3 brings no further gain.
_MOST_PASSES = 2


def run_alone(backbone: Backbone, request: Request) -> Answer:
    """Runs the request alone, in this thread. Raises any failure."""
    total = Answer()
    for parts in plan([(request.rows, request.row_tokens)], backbone.limits):
        for answer in run_parts(backbone, [request], parts):
            if isinstance(answer, Exception):
                raise answer
            total.add(answer)
    return total


@dataclass
class PackCounters:
    """Sums over all packs so far, from which rates can be computed."""

    packs: int = 0
    rows: int = 0
    tokens: int = 0  # without padding
    row_slots: int = 0  # rows that would have fitted into the same packs
    active_s_before: float = 0.0  # time with at least one pack being computed, without the current
    active_since: float | None = None  # stretch, which began then

    def active_s(self) -> float:
        now = 0.0 if self.active_since is None else time.monotonic() - self.active_since
        return self.active_s_before + now


class _Pending:
    """A submitted request, its answer so far, and how many of its rows are missing."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.future: Future[Answer] = Future()
        self.answer, self.rows_out = Answer(), request.rows
        self.passed_over = 0  # packs that were started before it

    def add(self, part: Part, result: Answer | Exception) -> None:
        if self.future.done():
            return  # another part of it has failed
        if isinstance(result, Exception):
            self.future.set_exception(result)
            return
        self.answer.add(result)
        self.rows_out -= len(part)
        if not self.rows_out:
            self.future.set_result(self.answer)


class Packer:
    """Runs the requests of concurrent trials in shared packs, on a swarm several concurrently.

    A training thread calls `run`, which blocks until the answer is there, inside
    `with packer.member():`, so that the packer knows how many requests are worth waiting for.
    """

    def __init__(self, backbone: Backbone, threads: int | None = None) -> None:
        """Packs are computed with `threads` torch threads; by default with all that torch has now.

        From now on, every other thread of the process gets one. libgomp keeps a thread pool for
        each calling thread; once the pools together have more threads than there are CPUs, idle
        threads sleep between kernels instead of spinning, and every kernel pays a wake-up: a pack
        of 12 rows of the demo model then takes 47 ms instead of 17.
        """
        self.backbone, self.counters = backbone, PackCounters()
        self._limits = backbone.limits
        self._waiting: list[_Pending] = []
        self._members = 0  # threads that may submit a request at any moment
        self._running = 0  # requests that are being computed
        self._pack_s = 0.0  # recent duration of a pack
        self._changed = threading.Condition()
        self._closed = False
        in_flight = self._limits.packs_in_flight
        share = max(1, (threads or torch.get_num_threads()) // in_flight)
        ready = threading.Barrier(in_flight + 1)
        self._workers = [
            threading.Thread(target=self._work, args=(share, ready), name=f"pack-{i}", daemon=True)
            for i in range(in_flight)
        ]
        for worker in self._workers:
            worker.start()
        ready.wait()
        torch.set_num_threads(1)

    def run(self, request: Request) -> Answer:
        """The request's answer, as if it had been run alone. Raises only its own failures."""
        pending = _Pending(request)
        with self._changed:
            if self._closed:
                raise RuntimeError("the packer is closed")
            self._waiting.append(pending)
            self._changed.notify_all()
        return pending.future.result()

    @contextmanager
    def member(self) -> Iterator[None]:
        with self._changed:
            self._members += 1
        try:
            yield
        finally:
            with self._changed:
                self._members -= 1
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()

    def _work(self, threads: int, ready: threading.Barrier) -> None:
        torch.set_num_threads(threads)
        torch.get_num_threads()  # fixes the number for this thread, whatever is set elsewhere
        ready.wait()
        while chosen := self._take():
            requests = [pending.request for pending in chosen]
            began = time.monotonic()
            sizes = [(request.rows, request.row_tokens) for request in requests]
            for parts in plan(sizes, self._limits):
                if all(pending.future.done() for pending in chosen):
                    break  # a request too large for one pack has failed in an earlier one
                results = run_parts(self.backbone, requests, parts)
                with self._changed:
                    self._count(requests, parts)
                for part, result in zip(parts, results, strict=True):
                    chosen[part.request].add(part, result)
            with self._changed:
                self._running -= len(chosen)
                if not self._running:
                    self.counters.active_s_before = self.counters.active_s()
                    self.counters.active_since = None
                took = time.monotonic() - began
                self._pack_s = took if not self._pack_s else 0.8 * self._pack_s + 0.2 * took

    def _take(self) -> list[_Pending]:
        """The requests of the next pack; none once the packer is closed and all have been taken."""
        with self._changed:
            while self._waiting or not self._closed:
                if not self._waiting:
                    self._changed.wait()
                    continue
                self._linger()
                if self._waiting:  # or another worker was faster
                    return self._choose()
            return []

    def _linger(self) -> None:
        """Waits for more requests until the pack is worth starting or the time is up."""
        patience = max(_LINGER_S, min(_LINGER_SHARE * self._pack_s, _LONGEST_LINGER_S))
        latest = time.monotonic() + 2 * patience
        while self._waiting and not self._worth_starting():
            come, left = len(self._waiting), latest - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(min(left, patience))
            if len(self._waiting) == come:
                return

    def _worth_starting(self) -> bool:
        """Whether all requests, this worker's share of them or a full pack are waiting."""
        come, width = len(self._waiting), max(p.request.row_tokens for p in self._waiting)
        return (
            come + self._running >= self._members
            or come * self._limits.packs_in_flight >= self._members
            or sum(p.request.rows for p in self._waiting) >= self._limits.rows(width)
            or self._closed
        )

    def _choose(self) -> list[_Pending]:
        """The oldest requests that fit into one pack; either all need gradients or none does.

        Evaluations yield to one or two training packs. Meanwhile, trials that are a step or two
        behind reach their own evaluation, and from then on all of them share packs.
        """
        waiting = self._waiting
        evaluations = [pending for pending in waiting if not pending.request.needs_grad]
        needs_grad = len(evaluations) < len(waiting) and all(
            evaluation.passed_over < _MOST_PASSES for evaluation in evaluations
        )
        chosen: list[_Pending] = []
        self._waiting = []
        rows = width = 0
        for pending in waiting:
            request = pending.request
            wider = max(width, request.row_tokens)
            fits = rows + request.rows <= self._limits.rows(wider)
            if request.needs_grad == needs_grad and (fits or not chosen):
                chosen.append(pending)
                rows, width = rows + request.rows, wider
            else:
                pending.passed_over += 1
                self._waiting.append(pending)
        self._running += len(chosen)
        if self.counters.active_since is None:
            self.counters.active_since = time.monotonic()
        return chosen

    def _count(self, requests: list[Request], parts: list[Part]) -> None:
        counters = self.counters
        rows = sum(map(len, parts))
        width = max(requests[part.request].row_tokens for part in parts)
        counters.packs += 1
        counters.rows += rows
        counters.tokens += sum(len(part) * requests[part.request].row_tokens for part in parts)
        counters.row_slots += max(rows, self._limits.rows(width))
