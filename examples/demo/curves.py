"""The picture: losses of every attempt on top of the twin's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
from examples.demo.kills import Kill
from examples.demo.training import Loss
from matplotlib.axes import Axes

__all__ = ["draw"]

COLOURS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#66ccee", "#bbbb44")
STEPS_AROUND = 12


def draw(killed: Sequence[Loss], twin: Sequence[Loss], kills: Sequence[Kill], path: Path) -> None:
    """Write a PNG: all steps, and those around each kill."""
    figure = plt.figure(figsize=(12, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, len(kills), height_ratios=(3, 2))
    whole = figure.add_subplot(grid[0, :])
    attempts = [list(group) for _, group in groupby(killed, key=lambda loss: loss.pid)]
    _draw_losses(whole, attempts, twin)
    whole.set_title(
        f"{len(twin)} steps, {len(kills)} kills, {len(killed)} losses in {len(kills) + 1} attempts: "
        "each is exactly the twin's"
    )
    whole.set_ylabel("loss")
    whole.legend(loc="upper right")
    for kill in kills:
        whole.axvline(kill.at_step, color="#cc3311", linewidth=0.8, linestyle=":")
    for number, kill in enumerate(kills):
        near = figure.add_subplot(grid[1, number])
        first, last = kill.at_step - STEPS_AROUND, kill.at_step + STEPS_AROUND
        parts = [_between(attempt, first, last) for attempt in attempts]
        _draw_losses(near, parts, _between(twin, first, last), marker="o")
        near.axvline(kill.at_step, color="#cc3311", linestyle=":")
        near.set_title(
            f"kill {number + 1} after step {kill.at_step}: {kill.lost_steps} done again", fontsize=10
        )
        near.set_xlabel("step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _between(losses: Sequence[Loss], first: int, last: int) -> list[Loss]:
    return [loss for loss in losses if first <= loss.step <= last]


def _draw_losses(
    axes: Axes, attempts: Sequence[Sequence[Loss]], twin: Sequence[Loss], marker: str = ""
) -> None:
    for number, attempt in enumerate(attempts):
        axes.plot(
            [loss.step for loss in attempt],
            [loss.loss for loss in attempt],
            color=COLOURS[number % len(COLOURS)],
            linewidth=4,
            alpha=0.5,
            marker=marker,
            markersize=8,
            label=f"attempt {number + 1}",
        )
    axes.plot(
        [loss.step for loss in twin],
        [loss.loss for loss in twin],
        color="black",
        linewidth=0.8,
        marker=marker and ".",
        markersize=4,
        label="twin, never killed",
    )
