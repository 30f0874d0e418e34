"""Runs that are killed, or told to stop, at random moments end with the very weights of a run that was left alone."""

import signal

import kills
import pytest

# `make chaos` kills all 23 configurations, 1,000 times
KILLED = {
    "shared prefixes": 10, "dropout, persistent workers": 10, "one checkpoint": 10, "epochs": 8,
    "two processes, shared prefixes, dropout": 4, "streaming, token budget, workers, dropout": 6,
}  # fmt: skip
TOLD = {signal.SIGTERM: "dropout, workers", signal.SIGHUP: "accumulation", signal.SIGINT: "two processes"}


@pytest.mark.parametrize("name", KILLED)
def test_killed_runs_end_as_if_nothing_had_been(name, tmp_path):
    survival = kills.survive(name, kills.records(tmp_path / "records.jsonl"), tmp_path, KILLED[name], seed=1)
    assert not survival.problems
    assert sum(survival.kills.values()) == KILLED[name]


@pytest.mark.parametrize("number", TOLD)
def test_runs_that_are_told_to_stop_go_on_later(number, tmp_path):
    data = kills.records(tmp_path / "records.jsonl")
    survival = kills.survive(TOLD[number], data, tmp_path, kills=2, seed=2, number=number)
    assert not survival.problems
