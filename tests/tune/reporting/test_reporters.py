"""What people see while trials run: on a real terminal, through a pipe, in a notebook."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import IPython
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from tests.cli.processes import without_styles
from tests.tune.made_trials import make_result, make_trial

from keepstep.errors import UsageError
from keepstep.tune import CLIReporter, JupyterNotebookReporter, ProgressReporter
from keepstep.tune.experiment.trial import ERROR, PAUSED, RUNNING, TERMINATED, Trial
from keepstep.tune.reporting.base import Overview
from keepstep.tune.reporting.choosing import make_reporter
from keepstep.tune.reporting.echo import Echo
from keepstep.tune.reporting.lines import LinesReporter, SilentReporter
from keepstep.tune.reporting.watch import Watch
from keepstep.tune.reporting.words import duration


def overview(trials: list[Trial], **said: object) -> Overview:
    told: dict = {
        "name": "digits",
        "path": "/runs/digits",
        "trials": trials,
        "expected_trials": len(trials),
        "metric": "loss",
        "mode": "min",
        "elapsed_s": 100.0,
        "used": {"cpu": 1.0},
        "total": {"cpu": 2.0, "gpu": 0.0},
        "scheduler": "FIFO",
    }
    return Overview(**{**told, **said})


def trials_of(root: Path | str, statuses: list[str]) -> list[Trial]:
    trials = []
    for number, status in enumerate(statuses):
        trial = make_trial(root, number, config={"lr": 0.1 * (number + 1)})
        trial.evaluated_params = dict(trial.config)
        if status != "PENDING":
            make_result(trial, number + 1, loss=1.0 / (number + 1), acc=0.5)
            trial.starts = 1
        if status == ERROR:
            trial.num_failures, trial.error = 1, "ValueError: no"
        trial.status = status
        trials.append(trial)
    return trials


# -------------------------------------------------------------------------------------------- watch


def test_what_ended_is_looked_at_once_and_counted_for_ever(tmp_path: Path) -> None:
    watch = Watch("loss", "min")
    trials = trials_of(tmp_path, [RUNNING, RUNNING, PAUSED, "PENDING"])
    first = watch.look(trials)
    assert (first.counts, first.best) == ({"RUNNING": 2, "PAUSED": 1, "PENDING": 1}, trials[2])
    trials[0].status, trials[1].status = TERMINATED, ERROR
    trials[1].num_failures = 1
    second = watch.look(trials)
    assert second.counts == {"TERMINATED": 1, "ERROR": 1, "PAUSED": 1, "PENDING": 1}
    assert second.finished == 2
    assert [(trial.number, what) for trial, what in second.news] == [(0, "ended"), (1, "failed")]
    assert second.failed == [trials[1]]
    third = watch.look(trials)
    assert (third.counts, third.news) == (second.counts, [])
    assert third.ended == [trials[1], trials[0]]


def test_what_had_ended_before_a_restart_is_no_news(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, [TERMINATED, ERROR, "PENDING", RUNNING])
    watch = Watch("loss", "min")
    assert [(trial.number, what) for trial, what in watch.look(trials).news] == [(3, "started")]
    assert watch.look(trials).news == []


def test_nan_and_text_are_nobodys_best(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, [RUNNING, TERMINATED, TERMINATED])
    trials[0].last_result["loss"] = float("nan")
    trials[1].last_result["loss"] = "low"
    assert Watch("loss", "min").look(trials).best is trials[2]
    assert Watch("other", "min").look(trials).best is None
    assert Watch(None, None).look(trials).best is None


def test_a_look_at_ten_thousand_trials_costs_little(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, [TERMINATED] * 9_990 + [RUNNING] * 10)
    watch = Watch("loss", "min")
    watch.look(trials)
    taken = []
    for _ in range(5):
        began = time.process_time()
        watch.look(trials)
        taken.append(time.process_time() - began)
    assert min(taken) < 0.005


# -------------------------------------------------------------------------------------------- lines


def test_lines_tell_of_starts_ends_and_failures_at_once(tmp_path: Path) -> None:
    out: list[str] = []
    reporter = LinesReporter(out.append, status_every_s=1000)
    trials = trials_of(tmp_path, [RUNNING, RUNNING, RUNNING, "PENDING"])
    assert reporter.should_report(trials)
    reporter.report(overview(trials, messages=["checkpoint_frequency is left out\x1b[31m"]), done=False)
    assert not reporter.should_report(trials)
    trials[0].status, trials[0].ended_by = TERMINATED, "scheduler"
    trials[1].status, trials[1].num_failures, trials[1].error = ERROR, 1, "ValueError: no\nreally"
    trials[2].status, trials[2].num_failures, trials[2].error = "PENDING", 1, "killed by SIGKILL"
    reporter.report(overview(trials), done=False)
    trials[2].status, trials[2].starts = RUNNING, 2
    reporter.report(overview(trials), done=True)
    lines = "".join(out).splitlines()
    assert all(line.startswith("[digits] ") for line in lines)
    assert lines[0] == "[digits] checkpoint_frequency is left out [31m"
    assert lines[1] == f"[digits] {trials[0]} started: lr=0.1"
    assert (
        lines[4] == f"[digits] {trials[0]} TERMINATED by scheduler after 1 iteration, 0.5 s: loss=1 acc=0.5"
    )
    assert lines[5].endswith("failed (failure 1) and is tried again: killed by SIGKILL")
    assert f"{trials[1]} ERROR: ValueError: no really (see {trials[1].path}/error.txt)" in lines[6]
    assert f"{trials[2]} started again, from iteration 3: lr=" in lines[7]
    assert "2 of 4 trials ended · 1 running · 1 pending · 1 error · best loss 0.333333" in lines[8]
    assert "about 1 min 40 s left · CPU 1/2" in lines[8]
    assert lines[9].startswith(f"[digits] best: {trials[2]}: lr=0.3")
    assert len(lines) == 10


def test_lines_say_now_and_then_how_all_stands(tmp_path: Path) -> None:
    out: list[str] = []
    reporter = LinesReporter(out.append, status_every_s=0.0)
    reporter.report(overview([], expected_trials=None), done=False)
    assert out == ["[digits] no trials yet · 1 min 40 s · CPU 1/2\n"]
    ended = trials_of(tmp_path, [TERMINATED, TERMINATED])
    reporter.report(overview(ended, expected_trials=4), done=True)  # time was over
    assert "2 of 4 trials ended" in out[-1]
    assert "left" not in out[-1]


def test_an_experiment_that_goes_on_says_how_it_stood_and_starts_each_trial_once(tmp_path: Path) -> None:
    out: list[str] = []
    reporter = LinesReporter(out.append, status_every_s=1000)
    trials = trials_of(tmp_path, [TERMINATED, "PENDING"])
    make_result(trials[1], 1, loss=1.0)
    trials[1].starts = 1
    reporter.report(overview(trials), done=False)
    trials[1].status = RUNNING  # launched, and its process is not there yet
    reporter.report(overview(trials), done=False)
    trials[1].starts = 2
    reporter.report(overview(trials), done=False)
    lines = "".join(out).splitlines()
    assert lines[0].startswith("[digits] goes on: 1 of 2 trials ended · 1 pending")
    assert lines[1:] == ["[digits] train_e1_00001 started again, from iteration 1: lr=0.2"]


def test_thousands_of_news_are_a_few_lines(tmp_path: Path) -> None:
    out: list[str] = []
    reporter = LinesReporter(out.append)
    reporter.report(overview([]), done=False)
    reporter.report(overview(trials_of(tmp_path, [TERMINATED] * 5000)), done=False)
    text = "".join(out)
    assert text.count("\n") < 50
    assert "and 4,980 more ended" in text


# ---------------------------------------------------------------------------------------- terminal

ON_TERMINAL = """
import fcntl, struct, sys, termios
sys.path.insert(0, {root!r})
from keepstep.tune.reporting.choosing import make_reporter
from keepstep.tune.reporting.live import LiveReporter
from tests.tune.reporting.test_reporters import overview, trials_of
trials = trials_of("/runs", {statuses!r})
reporter = make_reporter(1)
assert isinstance(reporter, LiveReporter), reporter
try:
    reporter.report(overview(trials, messages=["a message"]), done=False)
    print("printed by the script")
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 60, 0, 0))
    trials[1].num_failures, trials[1].error, trials[1].status = 1, "ValueError: no", "ERROR"
    reporter.report(overview(trials), done=False)
    if {fails}:
        raise RuntimeError("in the driver")
    reporter.report(overview(trials), done=True)
finally:
    reporter.close()
"""


def on_terminal(statuses: list[str], *, fails: bool = False) -> str:
    root = str(Path(__file__).parents[3])
    code = ON_TERMINAL.format(root=root, statuses=statuses, fails=fails)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=env | {"TERM": "xterm-256color"},
    )
    os.close(slave)
    seen = b""
    while True:
        try:
            more = os.read(master, 65536)
        except OSError:
            break
        if not more:
            break
        seen += more
    os.close(master)
    assert process.wait(60) == int(fails), seen.decode()
    return seen.decode()


def test_a_terminal_shows_a_live_table_and_gets_its_cursor_back() -> None:
    seen = on_terminal([RUNNING, RUNNING, TERMINATED, PAUSED, *["PENDING"] * 9996])
    text = without_styles(seen)
    assert "best loss 0.25  train_e1_00003  lr=0.4" in text
    assert re.search(r"train_e1_00003\s+PAUSED\s+0.4\s+4\s+2.0 s\s+0.25\s+0.5", text)
    assert "more trials in /runs/digits" in text
    assert text.index("a message") < text.index("1 of 10,000 trials ended")
    assert "printed by the script" in text
    assert "ERROR: ValueError: no" in text
    last = text[text.rindex("2 of 10,000 trials ended") :]
    assert last.count("\n") <= 12  # the height it was given meanwhile
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")


def test_an_error_in_the_driver_gives_the_terminal_back() -> None:
    seen = on_terminal([RUNNING, RUNNING], fails=True)
    assert "RuntimeError: in the driver" in seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")


# ------------------------------------------------------------------------------- the names of ray


def printed(
    reporter: CLIReporter, trials: list[Trial], capsys: pytest.CaptureFixture[str], **said: object
) -> str:
    reporter.report(overview(trials, **said), done=True)
    return capsys.readouterr().out


def test_the_cli_reporter_takes_the_arguments_of_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    trials = trials_of(tmp_path, [RUNNING, TERMINATED, TERMINATED, ERROR])
    reporter = CLIReporter(
        metric_columns={"acc": "accuracy", "training_iteration": "it"},
        parameter_columns=["lr"],
        max_progress_rows=2,
        max_error_rows=1,
        max_report_frequency=1000,
        sort_by_metric=True,
        metric="loss",
        mode="max",
    )
    reporter.add_metric_column("loss", "the loss")
    assert reporter.should_report(trials)
    text = printed(reporter, trials, capsys, metric=None, mode=None)
    assert not reporter.should_report(trials)
    assert reporter.should_report(trials, done=True)
    assert re.search(r"trial\s+status\s+lr\s+iter\s+time\s+accuracy\s+it\s+the loss", text)
    rows = [line.split()[0] for line in text.splitlines() if re.search(r"(RUNNING|TERMINATED|ERROR) ", line)]
    assert rows == ["train_e1_00000", "train_e1_00001"]
    assert "and 2 more trials" in text
    assert "train_e1_00003 ERROR: ValueError: no" in text
    assert not CLIReporter(print_intermediate_tables=False).should_report(trials)
    with pytest.raises(UsageError, match="mode='best'"):
        CLIReporter(mode="best")  # type: ignore[arg-type]


def test_a_reporter_written_for_ray_is_told_of_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ended(CLIReporter):
        seen = 0

        def should_report(self, trials: Sequence[Trial], done: bool = False) -> bool:
            before, self.seen = self.seen, len([t for t in trials if t.status == Trial.TERMINATED])
            return self.seen > before

        def report(self, trials: Sequence[Trial], done: bool, *sys_info: object) -> None:  # type: ignore[override]
            print(*sys_info, [str(trial) for trial in trials], len(trials), trials[0])
            super().report(trials, done, *sys_info)  # type: ignore[arg-type]

    trials = trials_of(tmp_path, [RUNNING, TERMINATED])
    reporter = Ended()
    assert reporter.should_report(trials)
    assert not reporter.should_report(trials)
    text = printed(reporter, trials, capsys)
    assert text.startswith("['train_e1_00000', 'train_e1_00001'] 2 train_e1_00000\n")
    assert "TERMINATED" in text


def test_in_a_log_no_column_is_squeezed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"a_metric_of_{number}" for number in range(9)]
    (trial,) = trials_of(tmp_path, [RUNNING])
    trial.last_result |= dict.fromkeys(names, 0.125)
    text = printed(CLIReporter(metric_columns=names), [trial], capsys)
    assert all(name in text for name in names)
    assert text.count("0.125") == 9


def test_a_notebook_shows_one_table_that_changes(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, [RUNNING, "PENDING"])
    InteractiveShell.instance()
    try:
        with capture_output() as captured:
            reporter = JupyterNotebookReporter(metric_columns=["loss"])
            reporter.report(overview(trials, messages=["a message"]), done=False)
            trials[0].status = TERMINATED
            reporter.report(overview(trials), done=True)
    finally:
        InteractiveShell.clear_instance()
    first, second = (output.data["text/html"] for output in captured.outputs)
    assert "RUNNING" in first
    assert "a message" in first
    assert "TERMINATED" in second
    assert second.startswith("<pre")


# ----------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(9.94, "9.9 s"), (9.96, "10 s"), (59.7, "1 min 0 s"), (239.6, "4 min 0 s"), (3599.7, "1 h 0 min")],
)
def test_no_minute_has_sixty_seconds(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_who_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ProgressReporter()
    assert make_reporter(0, mine) is mine
    assert isinstance(make_reporter(0), SilentReporter)
    assert not make_reporter(0).should_report([], done=True)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert isinstance(make_reporter(1), LinesReporter)
    monkeypatch.setitem(sys.modules, "ipykernel", io)  # as by a library that only works with notebooks
    assert isinstance(make_reporter(1), LinesReporter)
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    assert isinstance(make_reporter(1), JupyterNotebookReporter)


FULL = """
import sys
from keepstep import tune

def train(config):
    for step in range(3):
        tune.report({"step": step})

config = tune.RunConfig(name="it…", storage_path=sys.argv[1], executor="inline", verbose=1)
(result,) = tune.Tuner(train, run_config=config).fit()
print(result.metrics["step"], file=sys.stderr)
"""


def test_an_experiment_goes_on_though_nobody_can_be_shown_how(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, tmp_path], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert "progress can't be shown any more, and the experiment goes on: [Errno 28]" in done.stderr
    assert "\n2\n" in done.stderr
    told = subprocess.run(
        [*command, tmp_path / "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
        check=False,
    )
    assert told.stdout.startswith("[it\\u2026] train_")


def test_through_a_pipe_rich_is_not_imported() -> None:
    code = (
        "import sys\nfrom keepstep.tune.reporting.choosing import make_reporter\nmake_reporter(1)\n"
        "print({'rich', 'torch', 'IPython'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --------------------------------------------------------------------------------------------- echo


def test_what_trials_print_is_shown_by_the_line(tmp_path: Path) -> None:
    out: list[str] = []
    echo, (trial,) = Echo(out.append), trials_of(tmp_path, [RUNNING])
    file = tmp_path / "stdout"
    file.write_bytes(b"shown before the restart\n")
    echo.start(trial, [file, tmp_path / "stderr"])
    echo.turn([trial])
    with file.open("ab") as stream:
        stream.write(b"one\ntw")
        stream.flush()
        echo.turn([trial])
        stream.write(b"o\n 10%\r 50%\r100%\r\n\x1b[31mred\x1b[0m \x07\xff\nnot ended")
        stream.flush()
        (tmp_path / "stderr").write_bytes(b"warning\n")
        echo.turn([trial])
    echo.end(trial)
    assert "".join(out).splitlines() == [
        f"({trial}) {line}" for line in ("one", "two", "100%", "red �", "warning", "not ended")
    ]


def test_a_file_that_is_begun_anew_is_followed_from_its_beginning(tmp_path: Path) -> None:
    out: list[str] = []
    echo, (trial,) = Echo(out.append), trials_of(tmp_path, [RUNNING])
    file = tmp_path / "stdout"
    file.write_bytes(b"a long line that was shown before\n")
    echo.start(trial, [file])
    file.write_bytes(b"anew\n")
    echo.turn([trial])
    assert out == [f"({trial}) anew\n"]


def test_the_last_failures_are_all_known(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, [ERROR, TERMINATED, ERROR])
    assert Watch("loss", "min").look(trials).failed == [trials[0], trials[2]]


def test_megabytes_are_counted_not_shown(tmp_path: Path) -> None:
    out: list[str] = []
    echo, (trial,) = Echo(out.append, bytes_a_turn=1000), trials_of(tmp_path, [RUNNING])
    file = tmp_path / "stdout"
    echo.start(trial, [file])
    file.write_bytes(b"a line of twenty b.\n" * 155_000)
    echo.turn([trial])
    lines = "".join(out).splitlines()
    assert len(lines) == 51
    assert lines[-1] == f"({trial}) ... 3.1 MB more in {file}"
    out.clear()
    with file.open("ab") as stream:
        stream.write(b"later\n")
        stream.flush()
        echo.turn([trial])
        stream.write(b"a line of twenty b.\n" * 60 + b"its beginning is left out, ")
        stream.flush()
        echo.turn([trial])
        out[1:] = []
        stream.write(b"and so is its end\nlater still\n")
    echo.turn([trial])
    file.unlink()
    echo.turn([trial])
    echo.end(trial)
    assert out == [f"({trial}) later\n", f"({trial}) later still\n"]


def test_a_line_without_an_end_is_cut(tmp_path: Path) -> None:
    out: list[str] = []
    echo, (trial,) = Echo(out.append), trials_of(tmp_path, [RUNNING])
    file = tmp_path / "stdout"
    echo.start(trial, [file])
    file.write_bytes(b"x" * 50_000 + b"\nend\n")
    echo.turn([trial])
    first, second = "".join(out).splitlines()
    assert first.endswith("xxx ... 45.9 kB more")
    assert len(first) < 4200
    assert second == f"({trial}) end"
