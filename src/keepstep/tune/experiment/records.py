"""What an experiment's journal says: one record for each thing that happened, with what was decided of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Final, Literal, get_args

from keepstep.errors import JournalError

__all__ = [
    "FORMAT",
    "Act",
    "CheckpointSaved",
    "CheckpointsDropped",
    "DriverStarted",
    "ExperimentEnded",
    "ExperimentMade",
    "Record",
    "ResultReported",
    "TrialAgain",
    "TrialEnded",
    "TrialFailed",
    "TrialLaunched",
    "TrialMade",
    "TrialStarted",
    "now",
    "parse_record",
    "to_node",
]

FORMAT: Final = 1
"""Version of the journal's format."""


def now() -> float:
    """The time as records have it: seconds since 1970."""
    return round(time.time(), 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Act:
    """What a scheduler did to a trial, beside what it decided of the one that reported.

    Attributes:
        do: "pause", "unpause", "stop" or "exploit".
        trial: its id.
        source: of an exploit: the id of the trial whose checkpoint it takes over.
        checkpoint: and that checkpoint's name.
        config: the new configuration, if JSON holds it; None: the scheduler has to be asked again.
        evaluated: what of it is not fixed.
    """

    do: Literal["pause", "unpause", "stop", "exploit"]
    trial: str
    source: str | None = None
    checkpoint: str | None = None
    config: Mapping[str, Any] | None = None
    evaluated: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentMade:
    """The first record.

    Attributes:
        time: seconds since 1970, as in every record.
        format: version of the journal.
        id: of the experiment, unique for ever; trial ids begin with it.
        name: of the experiment.
        trainable: the name of the function or class.
        seed: of everything drawn at random.
        spec: what makes it this experiment: space, metric, scheduler, ... as JSON.
    """

    kind: ClassVar[str] = "experiment"
    time: float
    format: int = FORMAT
    id: str
    name: str
    trainable: str
    seed: int
    spec: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverStarted:
    """A process took the experiment over; what ran before does not run any more.

    Attributes:
        time: seconds since 1970.
        host: where it runs.
        pid: its number there.
        spec: what makes the experiment what it is, where it differs from what was written down before.
    """

    kind: ClassVar[str] = "driver"
    time: float
    host: str
    pid: int
    spec: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialMade:
    """The searcher suggested a configuration.

    Attributes:
        time: seconds since 1970.
        trial: its id.
        config: complete, if JSON holds it; None: the searcher has to be asked again.
        evaluated: what of it was drawn or picked.
        tag: number and `evaluated`, as a name.
        dirname: its directory within the experiment's.
        resources: what it needs to run.
        name: what `trial_name_creator` said.
    """

    kind: ClassVar[str] = "trial"
    time: float
    trial: str
    config: Mapping[str, Any] | None
    evaluated: Mapping[str, Any]
    tag: str
    dirname: str
    resources: Mapping[str, float]
    name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialLaunched:
    """A trial is given to the executor: from here on it runs, for all who decide."""

    kind: ClassVar[str] = "launched"
    time: float
    trial: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialStarted:
    """A trial's code runs, in this process."""

    kind: ClassVar[str] = "started"
    time: float
    trial: str
    pid: int
    host: str
    ip: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultReported:
    """A trial reported, and this was decided.

    Attributes:
        time: seconds since 1970.
        trial: its id.
        iteration: `training_iteration`.
        metrics: what it reported.
        this_s: seconds of training since the result before.
        total_s: seconds of training in all.
        since: iterations since the last start.
        decision: "CONTINUE", "PAUSE", "STOP" or "NOOP" (the trial itself is among `acts`).
        why: who stopped it: "done", "stop", "scheduler"; or "refused": nobody could make anything of it.
        checkpoint: the name of what was committed with it.
        bytes: what that takes on disk.
        acts: what the scheduler did to trials with it.
        callbacks: {number of the callback: its new state}.
        left_out: {metric: kind of value} of what JSON does not hold.
        saves: whether the trial ends with it, and with a checkpoint yet to come: `CheckpointSaved` follows.
    """

    kind: ClassVar[str] = "result"
    time: float
    trial: str
    iteration: int
    metrics: Mapping[str, Any]
    this_s: float
    total_s: float
    since: int
    decision: str = "CONTINUE"
    why: str | None = None
    checkpoint: str | None = None
    bytes: int = 0
    acts: Sequence[Act] = ()
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    saves: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """A checkpoint was committed without a new result."""

    kind: ClassVar[str] = "saved"
    time: float
    trial: str
    iteration: int
    total_s: float
    checkpoint: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointsDropped:
    """These checkpoints are about to be deleted: [(trial, name), ...]."""

    kind: ClassVar[str] = "dropped"
    time: float
    checkpoints: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialFailed:
    """A trial raised, or its process died.

    Attributes:
        time: seconds since 1970.
        trial: its id.
        error: in one line.
        final: whether it is not tried again.
        traceback: if an exception was raised.
        acts: what the scheduler did to trials with it.
    """

    kind: ClassVar[str] = "failed"
    time: float
    trial: str
    error: str
    final: bool
    traceback: str = ""
    acts: Sequence[Act] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialEnded:
    """A trial's code came to its end.

    Attributes:
        time: seconds since 1970.
        trial: its id.
        why: "done": by itself; "left": a restore was not to go on with it.
        acts: what the scheduler did to trials with it.
    """

    kind: ClassVar[str] = "ended"
    time: float
    trial: str
    why: str = "done"
    acts: Sequence[Act] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialAgain:
    """A trial that had ended is run again, from its last checkpoint or (`anew`) from the beginning."""

    kind: ClassVar[str] = "again"
    time: float
    trial: str
    anew: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentEnded:
    """Why no more is done: "all" is, "time" is over, "stop" was said, a trial "failed", "interrupted"."""

    kind: ClassVar[str] = "done"
    time: float
    why: str


Record = (
    ExperimentMade
    | DriverStarted
    | TrialMade
    | TrialLaunched
    | TrialStarted
    | ResultReported
    | CheckpointSaved
    | CheckpointsDropped
    | TrialFailed
    | TrialEnded
    | TrialAgain
    | ExperimentEnded
)

_KINDS: Final[dict[str, type[Record]]] = {kind.kind: kind for kind in get_args(Record)}
_MEMBERS: Final = {kind: fields(kind) for kind in (*_KINDS.values(), Act)}


def to_node(record: Record) -> dict[str, Any]:
    """A record as JSON holds it; members that say nothing are left out."""
    return {"kind": record.kind, **_members(record)}


def _members(said: Record | Act) -> dict[str, Any]:
    node: dict[str, Any] = {}
    for member in _MEMBERS[type(said)]:
        value = getattr(said, member.name)
        if member.default is not MISSING and value == member.default:
            continue
        if member.default_factory is not MISSING and not value:
            continue
        node[member.name] = [_members(act) for act in value] if member.name == "acts" else value
    return node


def parse_record(node: Mapping[str, Any]) -> Record:
    """A record from what JSON held.

    Raises:
        JournalError: it is none that this keepstep knows.
    """
    said = dict(node)
    kind = _KINDS.get(said.pop("kind", ""))
    if kind is None:
        raise JournalError(
            f"a record is of the kind {node.get('kind')!r:.60}, which this keepstep does not know; allowed: "
            f"{', '.join(_KINDS)}. Was the journal written by a newer keepstep?"
        )
    try:
        if "acts" in said:
            said["acts"] = tuple(Act(**act) for act in said["acts"])
        if "checkpoints" in said:
            said["checkpoints"] = tuple((trial, name) for trial, name in said["checkpoints"])
        return kind(**said)
    except (TypeError, ValueError) as error:
        raise JournalError(f"a record of the kind {kind.kind!r} is not as expected: {error}") from None
