"""Public names of a package that are imported when they are first asked for (PEP 562).

For type checkers the package imports the same names below `if TYPE_CHECKING`; the tests see that both agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from keepstep.errors import MissingPackageError

__all__ = ["imported", "lazy_names"]


def lazy_names(
    package: str,
    homes: Mapping[str, str],
    *,
    modules: Sequence[str] = (),
    needs: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a module that has an `__all__`.

    Args:
        package: its `__name__`.
        homes: {public name: full name of the module that has it}.
        modules: full names of modules that are public themselves, each by the last part of its name.
        needs: {package that a home imports and that may be missing: what to do if it is}.

    Returns:
        Both functions. The first raises AttributeError for names that are not public, with those that are,
        and MissingPackageError for a name whose home needs a package that is not installed.
    """
    whole = {module.rpartition(".")[2]: module for module in modules}

    def find(name: str) -> Any:
        if name in whole:
            value: Any = import_module(whole[name])
        elif name in homes:
            value = imported(name, homes[name], needs or {})
        else:
            public = ", ".join(sys.modules[package].__all__)
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has: {public}")
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *sys.modules[package].__all__})

    return find, names


def imported(name: str, home: str, needs: Mapping[str, str]) -> Any:
    """What a module has by a name.

    Args:
        name: of it.
        home: full name of the module.
        needs: {package that the module imports and that may be missing: what to do if it is}.

    Raises:
        MissingPackageError: one of these is not installed.
    """
    try:
        return getattr(import_module(home), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in needs:
            raise
        raise MissingPackageError(
            f"{name} needs {missing}, which is not installed: {needs[missing]}"
        ) from None
