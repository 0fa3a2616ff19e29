"""How numbers read: durations, metrics, resources, parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from keepstep.tune.executors.protocol import Resources
from keepstep.tune.experiment.trial import Trial

__all__ = ["amount", "bytes_in_words", "cut", "duration", "in_one_line", "parameters", "resources", "value"]

_MINUTE_S: Final = 60
_HOUR_S: Final = 3600


def duration(seconds: float) -> str:
    """In at most two units: "42 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < _MINUTE_S:
        return f"{seconds} s"
    if seconds < _HOUR_S:
        return f"{seconds // _MINUTE_S:.0f} min {seconds % _MINUTE_S:.0f} s"
    return f"{seconds // _HOUR_S:.0f} h {seconds % _HOUR_S // _MINUTE_S:.0f} min"


def value(found: Any) -> str:
    """A metric or a parameter; floats in six digits."""
    return "" if found is None else f"{found:.6g}" if isinstance(found, float) else in_one_line(str(found))


def cut(text: str, most: int) -> str:
    """At most so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def in_one_line(text: str) -> str:
    """Without what a terminal might act on."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def amount(number: float) -> str:
    """A share of a resource: "2", "0.5"."""
    return f"{number:.3g}"


def resources(used: Resources, total: Resources) -> str:
    """What of each there is is used: "CPU 2/8, GPU 0.5/1"; memory only if trials ask for it."""
    told = []
    for name, there in total.items():
        held = used.get(name, 0.0)
        if name.endswith("memory"):
            told += [f"{name} {bytes_in_words(held)}/{bytes_in_words(there)}"] if held else []
        elif there:
            told.append(f"{name.upper() if len(name) == 3 else name} {amount(held)}/{amount(there)}")
    return ", ".join(told)


def parameters(trial: Trial, most: int = 6) -> str:
    """What of a trial's configuration was drawn or picked: "lr=0.1 width=3"."""
    said: Mapping[str, Any] = trial.evaluated_params
    shown = [f"{name}={cut(value(found), 40)}" for name, found in list(said.items())[:most]]
    return " ".join([*shown, "..."] if len(said) > most else shown)


def bytes_in_words(size: float) -> str:
    """Three digits and a unit: "3.1 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
