"""A journal: what was appended is read back, a torn end is dropped, a change in the middle is found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from keepstep.errors import ExperimentNotFoundError, JournalError, NoSpaceError
from keepstep.tune.experiment.journal import JOURNAL_NAME, Journal, LocalLog, parse_journal, read_journal
from keepstep.tune.experiment.records import (
    Act,
    CheckpointsDropped,
    ExperimentMade,
    Record,
    ResultReported,
    TrialMade,
)

RECORDS: list[Record] = [
    ExperimentMade(time=1.5, id="a" * 16, name="näme", trainable="train", seed=3, spec={"metric": "loss"}),
    TrialMade(
        time=2.0,
        trial="aaaaa_00000",
        config={"lr": 0.1, "layers": [1, 2]},
        evaluated={"lr": 0.1},
        tag="0_lr=0.1",
        dirname="train_aaaaa_00000",
        resources={"cpu": 1.0},
    ),
    ResultReported(
        time=3.0,
        trial="aaaaa_00000",
        iteration=1,
        metrics={"loss": 0.25, 'quoted "x"': float("inf")},
        this_s=0.5,
        total_s=0.5,
        since=1,
        decision="PAUSE",
        acts=(Act(do="stop", trial="aaaaa_00000"),),
    ),
    CheckpointsDropped(time=4.0, checkpoints=(("aaaaa_00000", "checkpoint_000000"),)),
]


def written(path: Path) -> bytes:
    journal = Journal(LocalLog(path / JOURNAL_NAME))
    for record in RECORDS:
        journal.add(record)
        journal.commit()
    journal.close()
    return (path / JOURNAL_NAME).read_bytes()


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    written(tmp_path)
    assert read_journal(tmp_path) == RECORDS


def test_each_line_is_json_and_says_its_kind(tmp_path: Path) -> None:
    kinds = [json.loads(line)["kind"] for line in written(tmp_path).splitlines()]
    assert kinds == ["experiment", "trial", "result", "dropped"]


def test_a_journal_cut_at_any_byte_gives_whole_records_and_nothing_else(tmp_path: Path) -> None:
    data = written(tmp_path)
    ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        told = parse_journal(data[:cut], "it")
        whole = sum(end <= cut for end in ends)
        assert told.records == RECORDS[:whole]
        assert told.size == (ends[whole - 1] if whole else 0)


def test_a_last_line_of_zeros_is_dropped(tmp_path: Path) -> None:
    """A power cut may leave the length of a file, and not its bytes."""
    data = written(tmp_path)
    assert parse_journal(data + b"\0" * 300, "it").records == RECORDS
    assert parse_journal(data + b"\0" * 300 + b"\n", "it").records == RECORDS


def test_going_on_cuts_the_torn_end_off(tmp_path: Path) -> None:
    data = written(tmp_path)
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(data[:-7])
    log = LocalLog(path)
    log.cut(parse_journal(log.read(), "it").size)
    journal = Journal(log)
    journal.add(RECORDS[3])
    journal.commit()
    assert path.read_bytes() == data


@pytest.mark.parametrize("line", [0, 1, 2])
def test_any_changed_byte_before_the_end_is_found(tmp_path: Path, line: int) -> None:
    lines = written(tmp_path).split(b"\n")
    for at in range(0, len(lines[line]), 7):
        changed = bytearray(lines[line])
        changed[at] ^= 4
        damaged = b"\n".join([*lines[:line], bytes(changed), *lines[line + 1 :]])
        with pytest.raises(JournalError, match=f"line {line + 1} of it is damaged"):
            parse_journal(damaged, "it")


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    journal = Journal(LocalLog(tmp_path / JOURNAL_NAME))
    journal.add(ExperimentMade(time=1.0, format=2, id="b" * 16, name="n", trainable="t", seed=1, spec={}))
    journal.commit()
    with pytest.raises(JournalError, match=r"format 2.*upgrade keepstep"):
        read_journal(tmp_path)


def test_a_directory_without_a_journal_is_no_experiment(tmp_path: Path) -> None:
    with pytest.raises(ExperimentNotFoundError, match="holds no experiment"):
        read_journal(tmp_path)


def test_a_disk_that_refuses_leaves_nothing_of_what_was_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(tmp_path)
    journal = Journal(LocalLog(tmp_path / JOURNAL_NAME))

    def full(fd: int) -> None:
        raise OSError(28, os.strerror(28))

    journal.add(RECORDS[3])
    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(
        NoSpaceError, match=r"no space for adding results to .*journal\.jsonl.*Trials are"
    ) as said:
        journal.commit()
    assert "unfinished checkpoint" not in str(said.value)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == data
