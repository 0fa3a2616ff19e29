"""Messages of many ranks: once, from all of them, or one rank after the other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

from keepstep.errors import UsageError
from keepstep.track import here

__all__ = ["RankLogger", "get_logger"]


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose methods take two more keywords, `main_process_only` and `in_order`.

    With several ranks each message begins with the rank that says it. See `get_logger`.
    """

    _said: set[tuple[object, ...]] = set()  # noqa: RUF012  (what any of them has warned of, once)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Put the rank in front."""
        place = here.current()
        kwargs.setdefault("stacklevel", 2)  # the caller's line, not the one below
        return (f"[RANK {place.rank}] {msg}" if place.size > 1 else msg), kwargs

    def log(  # type: ignore[override]  # logging's own keywords are among kwargs
        self,
        level: int,
        msg: object,
        *args: object,
        main_process_only: bool = True,
        in_order: bool = False,
        **kwargs: Any,
    ) -> None:
        """Log a message.

        Args:
            level: of `logging`.
            msg: with `%` places for `args`, as in `logging`.
            args: what to fill in.
            main_process_only: only the main process says it.
            in_order: every rank says it, one after the other; all of them have to call this.
            kwargs: those of `logging.Logger.log`.
        """
        if not self.isEnabledFor(level):
            return
        place = here.current()
        text, kept = self.process(msg, kwargs)
        if not in_order:
            if place.rank == 0 or not main_process_only:
                self.logger.log(level, text, *args, **kept)
            return
        for rank in range(place.size):
            if rank == place.rank:
                self.logger.log(level, text, *args, **kept)
            place.barrier()

    def warning_once(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Warn, unless this process's logger of this name has warned with the same words before."""
        said = (self.logger.name, str(msg), tuple(map(repr, args)))
        if said not in self._said:
            self._said.add(said)
            self.log(logging.WARNING, msg, *args, **{"stacklevel": 3, **kwargs})


def get_logger(name: str, log_level: str | None = None) -> RankLogger:
    """A logger that says things once, however many ranks there are.

    Works before an Accelerator is made; the launcher's environment then says which rank this is.

    Args:
        name: of the logger, as `__name__`.
        log_level: "DEBUG", "INFO" ...; None reads KEEPSTEP_LOG_LEVEL, then ACCELERATE_LOG_LEVEL, and
            leaves the level of `logging` if neither is set. Only this logger's level is changed.

    Raises:
        UsageError: there is no such level.
    """
    logger = logging.getLogger(name)
    wanted = log_level if log_level is not None else here.level_from_environment()
    if wanted is not None:
        levels: Mapping[str, int] = logging.getLevelNamesMapping()
        if wanted.upper() not in levels:
            raise UsageError(
                f"log level {wanted!r} is none that logging knows; allowed: "
                f"{', '.join(sorted(levels, key=lambda known: levels[known]))}"
            )
        logger.setLevel(wanted.upper())
    return RankLogger(logger, {})
