"""What the fields of a stored record may be: one table a record, one sentence an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditq_runtime.errors import CheckpointError

MOST = 1 << 16  # no count in a scheme comes near: groups, shifts, ranks, sizes of groups
LONGEST = 60  # characters of a damaged value that a message repeats


@dataclass(frozen=True)
class Rule:
    """One field.

    Attributes:
        kind: its type, exactly: no bool passes for an int.
        choices: the values it may have; empty: any.
        least: of a count, which is at most `MOST`; None: no count.
        optional: the field may be absent.
        nullable: the field may be null.
        items: type of the members of a list, or of the values of an object, whose keys are strings; None: any.
    """

    kind: type
    choices: tuple[str, ...] = ()
    least: int | None = None
    optional: bool = False
    nullable: bool = False
    items: type | None = None


def check_record(stored: Any, rules: Mapping[str, Rule], where: str) -> dict[str, Any]:
    """A stored object whose keys and values are as its rules say.

    Raises:
        CheckpointError: names the first key or value that is not.
    """
    if not isinstance(stored, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(stored).__name__}")
    missing = sorted(key for key, rule in rules.items() if key not in stored and not rule.optional)
    extra = sorted(map(str, stored.keys() - rules.keys()))
    if missing or extra:
        raise CheckpointError(f"{where}: missing keys {missing}, unknown keys {shown(extra)}")
    for key, value in stored.items():
        check_value(f"{where}: {key}", value, rules[key])
    return stored


def check_value(what: str, found: Any, rule: Rule) -> None:
    """CheckpointError unless a value is as its rule says."""
    if found is None and rule.nullable:
        return
    value, kind = found, type(found)
    if kind is not rule.kind:
        raise CheckpointError(
            f"{what} must be of type {rule.kind.__name__}, got {shown(value)}; the config.json is damaged"
        )
    if rule.choices and value not in rule.choices:
        raise CheckpointError(f"{what} must be one of {rule.choices}, got {shown(value)}")
    if rule.least is not None and not rule.least <= value <= MOST:
        raise CheckpointError(
            f"{what} must be a count of at least {rule.least} and at most {MOST}, got {shown(value)}"
        )
    if rule.items is not None:
        for member in value:
            name, item = (member, value[member]) if rule.kind is dict else ("an entry", member)
            if type(name) is not str or type(item) is not rule.items:
                raise CheckpointError(
                    f"{what}: {name} must be of type {rule.items.__name__}, got {shown(item)}; "
                    "the config.json is damaged"
                )


def shown(value: Any) -> str:
    """A damaged value in a message, cut short."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or an int of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
