"""What a searcher is asked and told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final, Literal

from keepstep.errors import UsageError

__all__ = ["Searcher", "Suggestible"]


class Suggestible:
    """Something that may know the metric by itself, or be told of the experiment's."""

    metric: str | None = None
    mode: Literal["min", "max"] | None = None

    @cached_property
    def messages(self) -> list[str]:
        """What people should be told; the driver takes it out after each call."""
        return []

    def set_search_properties(
        self, metric: str | None, mode: Literal["min", "max"] | None, config: Mapping[str, Any], **spec: Any
    ) -> bool:
        """Take over what `TuneConfig` says.

        Args:
            metric: None: it says nothing.
            mode: likewise.
            config: the experiment's `param_space`; {}: there is none.
            spec: more that may be said; a searcher is told `num_samples`.

        Returns:
            False if it has its own and this one contradicts it.

        Raises:
            UsageError: both say something else.
        """
        for name, own, said in (("metric", self.metric, metric), ("mode", self.mode, mode)):
            if own is not None and said is not None and own != said:
                raise UsageError(
                    f"{type(self).__name__} was given {name}={own!r} and TuneConfig {name}={said!r}; say it "
                    "in one place"
                )
        self.metric = self.metric if self.metric is not None else metric
        self.mode = self.mode if self.mode is not None else mode
        return True


class Searcher(Suggestible):
    """Suggests configurations.

    A searcher must be a function of what it is asked and told, in the order of it, and of its seed: after a
    restart all of it is asked and told again, and it has to come to the same suggestions.

    Args:
        metric: what counts; None: what `TuneConfig` says.
        mode: "min" or "max".
    """

    FINISHED: Final = "FINISHED"
    """What `suggest` returns when there is nothing more to try."""

    counts_samples: bool = False
    """Whether it reads `num_samples` by itself, times its grid, and says `FINISHED` when they are over. Of
    any other searcher `num_samples` suggestions are taken, if it does not finish before."""

    pending_limit: int = 1
    """How many suggestions may wait for room to run: 1, if later ones are better for earlier reports."""

    def __init__(self, metric: str | None = None, mode: Literal["min", "max"] | None = None) -> None:
        self.metric = metric
        self.mode = mode

    def describe(self) -> dict[str, Any] | None:
        """The arguments that make it anew, by name; None: it has to be handed over again.

        They are kept with the experiment, as JSON, so that `Tuner.restore` needs no searcher. One that JSON
        does not hold, and that is no variable of a search space, has to be handed over again after all.
        """
        return None

    def set_seed(self, seed: int) -> None:
        """The experiment's seed, for a searcher that was not given one of its own."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """The metrics it learns from."""
        return () if self.metric is None else (self.metric,)

    @property
    def total_samples(self) -> int | None:
        """How many suggestions there will be, if that is known."""
        return None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The configuration of a new trial.

        Returns:
            It, nested; what `param_space` has besides is added to it. None: not now, ask again after the next
            result; `Searcher.FINISHED`: no more. None
            must leave the searcher as it was: after a restart only suggestions that were made are asked for.
        """
        raise NotImplementedError

    def evaluated(self, trial_id: str) -> dict[str, Any] | None:
        """What of the trial's suggestion was drawn or picked: {"layer/width": 3}; None: all of it was."""
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A trial reported."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A trial ended: with this last result, or with an error."""
