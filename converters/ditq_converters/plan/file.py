"""The plan as a JSON file: one entry a line, in the order of the model, so that two plans can be compared.

Fields that have their default are left out; a file that is read must name every entry of the model again.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from shlex import quote
from typing import Any, get_type_hints

from ditq_converters.plan.entries import AttentionPlan, Entry, LinearPlan, SitePlan
from ditq_converters.plan.plan import Plan
from ditq_runtime.files import atomic_file

PLAN_VERSION = 1
KINDS: dict[str, type[Any]] = {
    "sites": SitePlan,
    "linears": LinearPlan,
    "attention": AttentionPlan,
}
HEAD = ("plan_version", "architecture", "kept_dtype")


def write_plan(plan: Plan, path: str | Path) -> None:
    """Save a plan; the file appears complete or not at all."""
    with atomic_file(Path(path)) as part:
        part.write_text(to_json(plan), encoding="utf-8")


def read_plan(path: str | Path) -> Plan:
    """Read a plan.

    Args:
        path: a file of `write_plan` or `ditq plan`, perhaps edited.

    Raises:
        ValueError: no such file, not JSON, another version, an unknown or missing field, a value that a field cannot
            have; the sentence names the file and the entry.
    """
    path = Path(path)
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: no such plan; make it with `ditq plan MODEL --out {quote(str(path))}`"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_json(plan: Plan) -> str:
    """The text of a plan's file."""
    head = {
        "plan_version": PLAN_VERSION,
        "architecture": plan.architecture,
        "kept_dtype": plan.kept_dtype,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for kind in KINDS:
        entries = [
            f"    {json.dumps(entry.name)}: {json.dumps(to_dict(entry))}"
            for entry in getattr(plan, kind)
        ]
        body = "{\n" + ",\n".join(entries) + "\n  }" if entries else "{}"
        lines.append(f"  {json.dumps(kind)}: {body}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def to_dict(entry: Entry) -> dict[str, Any]:
    """The fields of an entry that have not their default, its name left out."""
    found = {}
    for field in fields(entry):
        value = getattr(entry, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name != "name" and value != default:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def from_json(text: str) -> Plan:
    """The plan of a file's text. Errors as `read_plan`, without the file."""
    try:
        stored = json.loads(text, object_pairs_hook=_without_doubles)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"plan: not valid JSON ({error})") from error
    _check_keys("plan", stored, (*HEAD, *KINDS), (*HEAD, *KINDS))
    if stored["plan_version"] != PLAN_VERSION:
        raise ValueError(
            f"plan: plan_version {stored['plan_version']!r}, this ditq reads {PLAN_VERSION}; make it again with "
            "`ditq plan`"
        )
    read: dict[str, Any] = {kind: _entries(kind, stored[kind]) for kind in KINDS}
    return Plan(**{name: stored[name] for name in HEAD[1:]}, **read)


def _entries(kind: str, stored: Any) -> tuple[Any, ...]:
    if not isinstance(stored, dict):
        raise ValueError(f"plan: {kind} must be an object of entries, got {stored!r}")
    return tuple(_entry(KINDS[kind], name, values) for name, values in stored.items())


def _entry(kind: type[Any], name: str, stored: Any) -> Any:
    own = [field for field in fields(kind) if field.name != "name"]
    needed = [f.name for f in own if f.default is MISSING and f.default_factory is MISSING]
    _check_keys(f"plan: {name}", stored, [field.name for field in own], needed)
    hints = get_type_hints(kind)
    for field, value in stored.items():
        if not _fits(value, hints[field]):
            raise ValueError(f"plan: {name}: {field} has the wrong type: {value!r}")
    values = {f: tuple(v) if isinstance(v, list) else v for f, v in stored.items()}
    return kind(name, **values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value can stand for a field of that type."""
    if hint == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if hint == tuple[int, int]:
        return isinstance(value, list) and [type(part) for part in value] == [int, int]
    if hint == int | None:
        return value is None or type(value) is int
    if hint == dict[str, Any]:
        return isinstance(value, dict)
    return type(value) is hint


def _check_keys(where: str, stored: Any, known: Any, needed: Any) -> None:
    if not isinstance(stored, dict):
        raise ValueError(f"{where}: must be an object, got {stored!r}")
    unknown = [key for key in stored if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; there are {', '.join(known)}")
    missing = [key for key in needed if key not in stored]
    if missing:
        raise ValueError(f"{where}: lacks the field {missing[0]!r}")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"plan: {key} is there twice")
        found[key] = value
    return found
