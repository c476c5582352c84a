"""The trial host without Ray: several trials at once, each with its own end."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tune_app.models.folder import model_folder
from tune_app.run import test_rows
from tune_app.run.run_dir import population_state, rows_file
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig
from tune_app.run.trial_report import Update
from tune_app.search.host import TrialHost
from tune_app.search.trial_job import TrialJob
from tune_app.serve.connection import Connection

CONFIG = SearchConfig(backbone="local", device="cpu", eval_rows=16)
SHORT = TrialConfig(steps=4, batch_size=2, lr=1e-2)


@pytest.fixture(scope="module")
def host() -> TrialHost:
    host = TrialHost("host-0", CONFIG, str(model_folder("demo")), threads=1)
    host.connect(Connection())
    yield host
    host.close()


async def updates_of(host: TrialHost, number: int) -> list[Update]:
    updates: list[Update] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        update = await host.next_update(number)
        if update.done or update.error is not None:
            return [*updates, update]
        if update.report is not None:
            updates.append(update)
    pytest.fail("no end within 60 s")


def train(host: TrialHost, *jobs: TrialJob) -> list[list[Update]]:
    async def together() -> list[list[Update]]:
        for job in jobs:
            await host.start(job, Connection())
        updates = await asyncio.gather(*(updates_of(host, job.number) for job in jobs))
        for job in jobs:
            await host.stop(job.number)
        return updates

    return asyncio.run(together())


def test_trials_that_share_a_host_report_what_each_reports_alone(
    host: TrialHost, tmp_path: Path
) -> None:
    configs = [SHORT, TrialConfig(steps=4, batch_size=3, prompt_length=5, lr=1e-3)]
    alone = [
        train(host, TrialJob(i, config, tmp_path / f"alone-{i}"))[0]
        for i, config in enumerate(configs)
    ]
    shared = train(
        host, *(TrialJob(i, config, tmp_path / f"shared-{i}") for i, config in enumerate(configs))
    )

    for one, other in zip(alone, shared, strict=True):
        assert [u.report.step for u in other if u.report] == [1, 2, 3, 4]
        losses = [u.report.eval_loss for u in one if u.report]
        assert [u.report.eval_loss for u in other if u.report] == pytest.approx(losses, rel=1e-4)


def test_a_trial_that_cannot_train_fails_alone(host: TrialHost, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "state.pt").write_bytes(b"no checkpoint")

    failed, fine = train(host, TrialJob(0, SHORT, broken), TrialJob(1, SHORT, tmp_path / "fine"))

    assert failed[-1].error is not None
    assert "Traceback" in failed[-1].error
    assert fine[-1].done


def test_a_trial_goes_on_from_its_checkpoint(host: TrialHost, tmp_path: Path) -> None:
    first = train(host, TrialJob(0, SHORT, tmp_path / "a"))[0]

    again = train(host, TrialJob(0, SHORT, tmp_path / "a"))[0]

    # Nothing is left to train: the last report, which may have got lost, and the end.
    assert [update.report for update in again] == [first[-2].report, None]
    assert again[-1].done


def test_a_stopped_trial_ends_its_thread(host: TrialHost, tmp_path: Path) -> None:
    async def start_and_stop() -> None:
        await host.start(
            TrialJob(7, TrialConfig(steps=5000, batch_size=1), tmp_path / "long"), Connection()
        )
        await host.stop(7)

    asyncio.run(start_and_stop())

    deadline = time.monotonic() + 10
    while any(thread.name == "trial-7" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert host.load() == 0


def test_who_asks_after_the_end_of_all_learns_of_it(host: TrialHost, tmp_path: Path) -> None:
    """Tune may ask on behalf of a trial that the host has ended a moment before."""

    async def end_and_ask() -> list[Update]:
        job = TrialJob(9, TrialConfig(steps=5000, batch_size=1), tmp_path / "long")
        await host.start(job, Connection())
        await host.stop_all()
        updates = await updates_of(host, 9)
        await host.stop(9)
        return updates

    last = asyncio.run(end_and_ask())[-1]
    assert (last.done, last.error) == (True, None)
    assert host.load() == 0


def test_a_trial_of_a_population_waits_until_it_is_asked(host: TrialHost, tmp_path: Path) -> None:
    job = TrialJob(8, SHORT, tmp_path / "waits", population=True)

    def kept() -> list[str]:
        return sorted(file.name for file in job.checkpoint.glob("step-*.pt"))

    async def look() -> list[list[str]]:
        await host.start(job, Connection())
        found = []
        for _ in range(3):
            update = Update()
            while update.report is None:
                update = await host.next_update(8)
            await asyncio.sleep(0.3)  # in which it would train on
            found.append(kept())
        await host.stop(8, TrialJob(8, replace(SHORT, lr=1.0), job.checkpoint))  # another life's
        assert host.load() == 1
        await host.stop(8, job)
        return found

    first, second, third = (f"step-0000000{step}.pt" for step in (1, 2, 3))
    assert asyncio.run(look()) == [[first], [first, second], [second, third]]
    deadline = time.monotonic() + 10
    while any(thread.name == "trial-8" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_trial_goes_on_from_another_ones_state(host: TrialHost, tmp_path: Path) -> None:
    """Until it has one of its own by the config that it has now."""
    own = TrialJob(0, replace(SHORT, prompt_length=3), tmp_path / "a", population=True)
    other = TrialJob(1, SHORT, tmp_path / "b", population=True)
    train(host, own, other)
    config = replace(SHORT, changes=((3, "lr", 0.1),))
    begin = population_state(other.checkpoint, 3)
    job = TrialJob(0, config, own.checkpoint, population=True, begin=begin)

    (updates,) = train(host, job)

    alone = train(host, TrialJob(2, config, tmp_path / "alone"))[0]
    losses = [u.report.eval_loss for u in updates if u.report]
    assert losses == pytest.approx([u.report.eval_loss for u in alone[2:4]], rel=1e-5)
    assert [u.report.step for u in updates if u.report] == [3, 4]
    begin.unlink()  # no longer asked for
    assert train(host, job)[0][0].report.eval_loss == losses[-1]


def test_confirmation_judges_once_and_on_the_test_split(host: TrialHost, tmp_path: Path) -> None:
    folder = tmp_path / "test" / "checkpoint"
    updates = train(host, TrialJob(0, SHORT, folder, of=7, look=1, test=True))[0]

    reports = [update.report for update in updates if update.report]
    assert [report.step for report in reports] == [4]
    rows = test_rows.read(rows_file(folder))
    assert rows is not None
    assert len(rows) == host.data_facts().summary.rows["test"]
    assert reports[0].metrics["test_loss"] == pytest.approx(
        sum(r["loss"] for r in rows) / len(rows)
    )
    assert 0 <= reports[0].metrics["test_accuracy"] <= 1


def test_what_only_chooses_sees_no_test_row(host: TrialHost, tmp_path: Path) -> None:
    folder = tmp_path / "choose" / "checkpoint"
    updates = train(host, TrialJob(0, SHORT, folder, of=7, look=0))[0]

    reports = [update.report for update in updates if update.report]
    assert [report.step for report in reports] == [4]
    assert "test_loss" not in reports[0].metrics
    assert not rows_file(folder).exists()


def test_counters_tell_what_was_packed(host: TrialHost, tmp_path: Path) -> None:
    before = host.counters()

    train(host, TrialJob(0, SHORT, tmp_path / "counted"))

    after = host.counters()
    trained, evaluated = SHORT.steps * SHORT.batch_size, 4 * CONFIG.eval_rows
    assert after.rows - before.rows == trained + evaluated
    assert 0 < after.occupancy <= 1
    assert after.requests == 0  # nobody is asked where the model is in the process


def test_what_each_trial_used_adds_up_to_what_the_host_did(host: TrialHost, tmp_path: Path) -> None:
    before = host.counters()

    jobs = [TrialJob(i, replace(SHORT, batch_size=2 + i), tmp_path / f"{i}") for i in range(3)]
    reports = [updates[-2].report for updates in train(host, *jobs)]

    after = host.counters()
    assert [report.metrics["rows"] for report in reports] == [
        4 * (2 + i) + 4 * CONFIG.eval_rows for i in range(3)
    ]
    for used, counted in (("rows", "rows"), ("packed_tokens", "tokens")):
        computed = getattr(after, counted) - getattr(before, counted)
        assert sum(report.metrics[used] for report in reports) == computed
    # A pack that carries rows of three trials counts for each of them.
    packs = after.packs - before.packs
    assert max(report.metrics["packs"] for report in reports) <= packs
    assert packs <= sum(report.metrics["packs"] for report in reports)
    for report in reports:
        assert 0 < report.metrics["wait_s"] <= report.seconds
        assert 0 < report.metrics["occupancy"] <= 1
        assert report.metrics["requests"] == report.metrics["retries"] == 0
    assert 0 < after.wait_s - before.wait_s <= sum(report.seconds for report in reports)


def test_a_diverging_and_a_stopped_trial_leave_the_third_alone(
    host: TrialHost, tmp_path: Path
) -> None:
    alone = train(host, TrialJob(0, SHORT, tmp_path / "alone"))[0]
    endless = TrialConfig(steps=5000, batch_size=1)
    explodes = replace(SHORT, lr=1e38, max_grad_norm=None)

    async def together() -> tuple[list[Update], list[Update]]:
        await host.start(TrialJob(2, endless, tmp_path / "endless"), Connection())
        await host.start(TrialJob(1, explodes, tmp_path / "explodes"), Connection())
        await host.start(TrialJob(0, SHORT, tmp_path / "together"), Connection())
        exploded = await updates_of(host, 1)
        await host.stop(2)
        return exploded, await updates_of(host, 0)

    exploded, fine = asyncio.run(together())

    assert exploded[-2].report.diverged
    losses = [update.report.eval_loss for update in alone if update.report]
    assert len(losses) == 4
    assert [u.report.eval_loss for u in fine if u.report] == pytest.approx(losses, rel=1e-4)


def test_rows_that_no_pack_can_hold_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tune_app.backbones.local.LocalBackbone._free_bytes", lambda self: 10**6)
    host = TrialHost("host-1", CONFIG, str(model_folder("demo")), threads=1)

    with pytest.raises(ConfigError, match="one row of 56 tokens do not fit into half of the mem"):
        host.connect(Connection())


def test_a_host_that_is_asked_for_an_unknown_trial_says_so(host: TrialHost) -> None:
    update = asyncio.run(host.next_update(12345))

    assert update.unavailable
    assert "does not know trial 12345" in (update.error or "")
