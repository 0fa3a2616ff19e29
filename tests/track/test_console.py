"""Messages and bars of one process; `test_ranks.py` has those of many."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from keepstep.errors import MissingPackageError, UsageError
from keepstep.logging import get_logger
from keepstep.track import bars


def test_a_logger_works_before_an_accelerator_is_made() -> None:
    code = (
        "import logging, sys\n"
        "logging.basicConfig(format='%(lineno)d %(funcName)s %(message)s')\n"
        "from keepstep.logging import get_logger\n"
        "logger = get_logger('x')\n"
        "def speak():\n"
        "    logger.warning('a %s', 'word')\n"
        "    logger.warning_once('once')\n"
        "    logger.error('in order', in_order=True)\n"
        "    logger.log(50, 'all', main_process_only=False)\n"
        "speak(); speak()\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first = ["6 speak a word", "7 speak once", "8 speak in order", "9 speak all"]
    assert done.stderr.splitlines() == [*first, *(line for line in first if "once" not in line)]


def test_the_level_comes_from_the_argument_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEEPSTEP_LOG_LEVEL", raising=False)
    monkeypatch.delenv("ACCELERATE_LOG_LEVEL", raising=False)
    root = logging.getLogger().level
    assert get_logger("levels.none").logger.level == logging.NOTSET
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "error")
    assert get_logger("levels.theirs").logger.level == logging.ERROR
    monkeypatch.setenv("KEEPSTEP_LOG_LEVEL", "INFO")
    assert get_logger("levels.ours").logger.level == logging.INFO
    assert get_logger("levels.said", log_level="debug").logger.level == logging.DEBUG
    assert logging.getLogger().level == root
    with pytest.raises(UsageError, match="'LOUD' is none that logging knows; allowed: NOTSET, DEBUG"):
        get_logger("levels.wrong", "LOUD")


def test_a_bar_is_a_tqdm_and_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(bars.tqdm(range(3), disable=True)) == [0, 1, 2]
    with pytest.raises(UsageError, match="pass it as main_process_only=True; the bar comes first"):
        bars.tqdm(True, range(3))
    monkeypatch.setattr(bars, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'keepstep\[tqdm\]'"):
        bars.tqdm(range(3))
