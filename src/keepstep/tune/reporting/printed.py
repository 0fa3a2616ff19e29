"""Reporters by the names of Ray Tune, that print a table every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from rich.console import Console

from keepstep.errors import UsageError
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.reporting.base import Overview, ProgressReporter
from keepstep.tune.reporting.table import Look, show
from keepstep.tune.reporting.watch import Watch

__all__ = ["CLIReporter", "TableReporter"]

_WIDEST: Final = 1000

Columns = Sequence[str] | Mapping[str, str]


def _headers(columns: Columns | None) -> dict[str, str] | None:
    if columns is None:
        return None
    return dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}


class TableReporter(ProgressReporter):
    """Base class of those that show a table.

    Args:
        metric_columns: names of metrics, or {name: header}; None: what is reported, what counts first.
        parameter_columns: names of parameters, or {name: header}; None or empty: what was drawn or picked.
        total_samples: how many trials there will be; None: as far as is known.
        max_progress_rows: most trials shown.
        max_error_rows: most failures shown.
        max_column_length: most characters of a value.
        max_report_frequency: seconds between two reports.
        infer_limit: most metrics shown if none were named.
        print_intermediate_tables: False: one table at the end.
        metric: what counts; None: what `TuneConfig` says.
        mode: "min" or "max".
        sort_by_metric: the best trials first; otherwise those that run.

    Raises:
        UsageError: the mode is neither.
    """

    def __init__(
        self,
        *,
        metric_columns: Columns | None = None,
        parameter_columns: Columns | None = None,
        total_samples: int | None = None,
        max_progress_rows: int = 20,
        max_error_rows: int = 20,
        max_column_length: int = 20,
        max_report_frequency: float = 5,
        infer_limit: int = 3,
        print_intermediate_tables: bool | None = None,
        metric: str | None = None,
        mode: Literal["min", "max"] | None = None,
        sort_by_metric: bool = False,
    ) -> None:
        if mode not in (None, "min", "max"):
            raise UsageError(f'{type(self).__name__}(mode={mode!r}); expected "min" or "max"')
        self._metrics = _headers(metric_columns)
        self._parameters = _headers(parameter_columns) or None
        self._total_samples = total_samples
        self._max_rows = max_progress_rows
        self._max_errors = max_error_rows
        self._max_length = max_column_length
        self._every_s = max_report_frequency
        self._infer_limit = infer_limit
        self._only_at_end = print_intermediate_tables is False
        self._metric, self._mode = metric, mode
        self._sort = sort_by_metric
        self._watch: Watch | None = None
        self._next = 0.0

    def add_metric_column(self, metric: str, representation: str | None = None) -> None:
        """Show one more metric, under this header."""
        self._metrics = {**(self._metrics or {}), metric: representation or metric}

    def add_parameter_column(self, parameter: str, representation: str | None = None) -> None:
        """Show one more parameter, under this header."""
        self._parameters = {**(self._parameters or {}), parameter: representation or parameter}

    def should_report(self, trials: Sequence[Trial], done: bool = False) -> bool:
        return done or (bool(trials) and not self._only_at_end and time.monotonic() >= self._next)

    def report(self, overview: Overview, done: bool) -> None:
        self._next = time.monotonic() + self._every_s
        overview = replace(
            overview,
            metric=self._metric or overview.metric,
            mode=self._mode or overview.mode,
            expected_trials=self._total_samples or overview.expected_trials,
        )
        if self._watch is None:
            self._watch = Watch(overview.metric, overview.mode)
        look = Look(
            metrics=self._metrics,
            parameters=self._parameters,
            max_rows=self._max_rows,
            max_errors=self._max_errors,
            max_column_length=self._max_length,
            infer_limit=self._infer_limit,
            sort_by_metric=self._sort,
        )
        standing = self._watch.look(overview.trials)
        self.display(show(overview, standing, self._watch, look), overview.messages, done)

    def display(self, table: Any, messages: Sequence[str], done: bool) -> None:
        """Show it.

        Args:
            table: of rich.
            messages: for people, since the last report.
            done: for the last time.
        """
        raise NotImplementedError


class CLIReporter(TableReporter):
    """Prints a table to standard output every few seconds; arguments as of `TableReporter`."""

    def display(self, table: Any, messages: Sequence[str], done: bool) -> None:
        console = Console(file=sys.stdout)
        if not console.is_terminal:  # a log has no edge at which columns would have to end
            wide = console.measure(table, options=console.options.update(max_width=_WIDEST))
            console.width = max(console.width, wide.maximum)
        for message in messages:
            console.print(message, markup=False, highlight=False)
        console.print(table)
