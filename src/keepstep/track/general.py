"""What every tracker is: Accelerate's contract for trackers of one's own, and what resuming adds to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from keepstep.errors import UsageError
from keepstep.track import here
from keepstep.track.position import Position

__all__ = ["BlankTracker", "GeneralTracker", "on_main_process"]

F = TypeVar("F", bound=Callable[..., Any])


def on_main_process(function: F) -> F:
    """Decorate a tracker's method to run on the main process only, if its `main_process_only` is True.

    Elsewhere it returns None.
    """

    @wraps(function)
    def only_there(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "main_process_only", False) and here.current().rank != 0:
            return None
        return function(self, *args, **kwargs)

    return cast(F, only_there)


class GeneralTracker:
    """Base class of trackers; derive from it to write one of your own.

    A derived class has

    - `name`: a string, by which `get_tracker` finds it;
    - `requires_logging_directory`: whether it needs a directory to write to;
    - `tracker`: what it drives (a run, a writer), often a property;
    - `main_process_only`: True (the default) calls it on the main process alone, False on every rank;

    and those of the methods below that have something to do. `begin` and `rewind` are keepstep's own: a
    tracker that uses them goes on in the same run, with one clean curve, when the training is resumed.

    Raises:
        UsageError: an attribute is missing.
    """

    name: str
    requires_logging_directory: bool
    main_process_only: bool = True

    if TYPE_CHECKING:

        @property
        def tracker(self) -> Any:
            """What it drives."""

    def __init__(self, _blank: bool = False) -> None:
        missing = [
            f"`{attribute}`"
            for attribute in ("name", "requires_logging_directory", "tracker")
            if attribute not in dir(self)
        ]
        if missing and not _blank:
            raise UsageError(
                f"{type(self).__name__} lacks {', '.join(missing)}, which every tracker has. Define them in "
                "the class, as `name = 'mine'`, `requires_logging_directory = False` and a property "
                "`tracker`; without `tracker` in the class, set it before super().__init__()"
            )

    def begin(self, run: str, *, continued: bool) -> None:
        """Called before `start`, and again if the run turns out to be another one.

        Args:
            run: id of the run: letters and digits, the same in every attempt and in all its checkpoints.
            continued: a checkpoint of the run was loaded: it may have been logged to before.
        """

    def rewind(self, position: Position) -> None:
        """Called after `start`, when the training goes on from a checkpoint.

        What was logged after `position` will be logged again, with the same values as far as the training is
        deterministic.
        """

    def start(self) -> None:
        """Open what is logged to; called once before anything is logged."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store a run's configuration.

        Args:
            values: as given to `init_trackers`.
        """

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values.

        Args:
            values: by name; tensors of one element are numbers already.
            step: of the run.
            kwargs: what `log_kwargs` holds for this tracker.
        """

    def finish(self) -> None:
        """Close it; the training has ended."""


class BlankTracker(GeneralTracker):
    """Stands for a tracker where there is none, as on every rank but the first: any call does nothing.

    Attributes of it are blank too, so that `get_tracker("wandb", unwrap=True).config.update(...)` works on
    every rank.
    """

    name = "blank"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__(_blank=True)

    @property
    def tracker(self) -> BlankTracker:
        """Itself."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> BlankTracker:
        return self

    def __setattr__(self, name: str, value: object) -> None:
        pass

    def __getitem__(self, key: object) -> BlankTracker:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __bool__(self) -> bool:
        return False
