"""Checks of the arguments of `LLM`. Each raises `InvalidRequest` that names the argument."""

from __future__ import annotations

from worker_orcd.config import FLAGS, check_range
from worker_orcd.errors import InvalidRequest


def check_counts(optional: bool = True, /, **values: object) -> None:
    """Check arguments that are values of `ServeConfig` too."""
    for name, value in values.items():
        flag = FLAGS[name]
        check_count(name, value, flag.least, flag.most, optional)


def check_count(name: str, value: object, least: float | None, most: float | None, optional: bool = False) -> None:
    """Refuse what is no whole number, `least` to `most`."""
    if value is None and optional:
        return
    low, high = int(least or 0), int(most or 0)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be a whole number, {low} to {high}", field=name)


def check_number(name: str, value: object) -> None:
    """Refuse what is no number, or out of the range of the field of `ServeConfig` of this name."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number", field=name)
    check_range(name, value)


def check_callable(**values: object) -> None:
    """Refuse what is neither callable nor None nor True."""
    for name, value in values.items():
        if value is not None and value is not True and not callable(value):
            raise InvalidRequest(f"{name} must be callable, not {type(value).__name__}", field=name)
