"""Two ranks: one writes, the others may call anything."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.spawn import run_ranks

from keepstep.errors import UsageError
from keepstep.logging import get_logger
from keepstep.track import read_log
from keepstep.tracking import GeneralTracker
from keepstep.utils import tqdm


class Everywhere(GeneralTracker):
    """Logs on every rank."""

    name = "everywhere"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.rows

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))


def together(directory: str, rank: int, size: int) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logger = get_logger("ranks")
    logger.info("early")

    from keepstep import Accelerator

    accelerator = Accelerator(cpu=True, project_dir=directory, log_with=["csv", Everywhere()])
    logger.info("main only")
    logger.info("every rank", main_process_only=False)
    logger.info("turn", in_order=True)
    bar = tqdm(range(3), main_process_only=True)
    everyone = tqdm(range(3), main_process_only=False)
    assert (bar.disable, everyone.disable) == (rank != 0, False)
    bar.close()
    everyone.close()

    model = torch.nn.Linear(2, 1)
    accelerator.prepare(model)
    accelerator.init_trackers("p", {"a": 1})
    for step in range(4):
        accelerator.log({"x": torch.tensor(float(step))}, step=step)
        if step == 1:
            accelerator.save_state()
    table = accelerator.get_tracker("csv")
    table.log_images({"no": "matter"}) if rank else None
    accelerator.get_tracker("csv", unwrap=True).name  # noqa: B018
    assert accelerator.get_tracker("everywhere").rows == [(s, {"x": float(s)}) for s in range(4)]
    with pytest.raises(UsageError, match="no such tracker"):
        accelerator.get_tracker("wandb")
    with pytest.raises(UsageError, match="names no tracker"):
        Accelerator(cpu=True, log_with="wanbd")
    accelerator.wait_for_everyone()
    accelerator.end_training()

    resumed = Accelerator(cpu=True, project_dir=directory, log_with="csv")
    resumed.prepare(torch.nn.Linear(2, 1))
    resumed.init_trackers("p")
    resumed.resume()
    for step in range(2, 5):
        resumed.log({"x": float(step)})
    resumed.save_state()
    resumed.end_training()


def test_one_rank_writes_and_the_others_may_call_anything(tmp_path: Path) -> None:
    outputs = run_ranks(__file__, "together", 2, tmp_path)
    said = [[line for line in output.splitlines() if "early" in line or "RANK" in line] for output in outputs]
    assert said == [
        ["[RANK 0] early", "[RANK 0] main only", "[RANK 0] every rank", "[RANK 0] turn"],
        ["[RANK 1] every rank", "[RANK 1] turn"],
    ]
    rows = read_log(tmp_path).rows
    assert [(row.step, row.values["x"], row.attempt) for row in rows] == [
        *((s, float(s), 1) for s in range(2)),
        *((s, float(s), 2) for s in range(2, 5)),
    ]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("row") == 7
    with (tmp_path / "p" / "metrics.csv").open(newline="") as file:
        assert [row["_step"] for row in csv.DictReader(file)] == ["0", "1", "2", "3", "4"]
