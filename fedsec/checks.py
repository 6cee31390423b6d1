"""Refusing what cannot work, before anything is computed: one line with key, rule and value."""

import math
from pathlib import Path

_ABSENT = object()


class Refused(ValueError):
    """The input was wrong. `str` is the one line a user reads: `key: rule, got value`."""

    def __init__(self, key: str, rule: str, got: object = _ABSENT):
        self.key, self.rule, self.got = key, rule, got
        super().__init__(f"{key}: {rule}" + ("" if got is _ABSENT else f", got {got}"))

    def under(self, group: str) -> "Refused":
        """The same refusal with its key read as a key of `group`."""
        return Refused(f"{group}.{self.key}", self.rule, self.got)


def require(holds: bool, key: str, rule: str, got: object = _ABSENT) -> None:
    """Refuse with `key: rule, got value` unless `holds`."""
    if not holds:
        raise Refused(key, rule, got)


def home_read(key: str, path: str) -> Path:
    """`path` with ~ read as a home folder; refused under `key` where nobody has that one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise Refused(key, "must be in a home folder that exists", path) from None


def at_least(owner: object, least: int, *keys: str) -> None:
    """Refuse fields `keys` of `owner` that are below `least`, or not finite."""
    for key in keys:
        value = getattr(owner, key)
        rule = f"must be at least {least}" + (" and finite" if isinstance(value, float) else "")
        require(least <= value < math.inf, key, rule, value)


def one_of(owner: object, key: str, *known: str) -> None:
    """Refuse a field `key` of `owner` that is none of `known`."""
    value = getattr(owner, key)
    require(value in known, key, f"must be {' or '.join(known)}", value)


def positive(owner: object, *keys: str) -> None:
    """Refuse fields `keys` of `owner` that are not above 0, or not finite."""
    for key in keys:
        value = getattr(owner, key)
        require(0 < value < math.inf, key, "must be above 0 and finite", value)
