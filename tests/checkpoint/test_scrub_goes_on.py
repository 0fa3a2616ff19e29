"""The scrub of a store outlives what fails for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.checkpoint.test_scrub import Notes, filled

from keepstep.checkpoint.keeping import scrub
from keepstep.errors import BucketError, KeepstepError, NoThreadError, StoreError
from keepstep.outcome import Latch


@pytest.mark.parametrize("kind", [BucketError, NoThreadError, StoreError])
def test_an_outage_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[KeepstepError]
) -> None:
    filled(tmp_path)
    again = Latch()
    calls = 0

    def listed(root: Path) -> list[scrub.Entry]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise kind("out of reach")
        again.open()
        return []

    monkeypatch.setattr(scrub, "scan", listed)
    monkeypatch.setattr(scrub, "_LONGEST_PAUSE_S", 0.01)
    scrubber = Notes(tmp_path).scrubber
    scrubber.start()
    assert again.wait(10)
    scrubber.stop()
