"""From a YAML file and overrides to a RunConfig, and from pydantic's faults to lines that a user can mend by."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from tasks.config.data import SIX_SETS
from tasks.config.run import RunConfig
from tasks.config.section import ConfigError, Section


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The RunConfig of a YAML file, with `path=value` overrides (values are YAML) laid over it.

    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type or a value out of range.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no config file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not keys and values")
    return overlaid(tree, overrides)


def overlaid(tree: dict[str, Any], overrides: Iterable[str]) -> RunConfig:
    """The RunConfig of a plain tree of values with `path=value` overrides, which are left in it. Raises ConfigError."""
    for override in overrides:
        _set(tree, override)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> RunConfig:
    """The RunConfig of a plain tree of values. Raises ConfigError with one line per fault."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error))) from None


def _set(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: write it as path=value, for example ppo.kl_coef=0.1")
    *parents, leaf = path.split(".")
    if parents[:2] == ["data", "sources"]:
        _name_sources(tree)
    for key in parents:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {key} holds a value, not keys")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        tree[leaf] = value


def _name_sources(tree: dict[str, Any]) -> None:
    """Write the default sources into a tree that names none, so that an override of one keeps the others."""
    data = tree.setdefault("data", {}) or {}
    if isinstance(data, dict) and data.get("sources") is None:
        tree["data"] = {**data, "sources": {name: {} for name in SIX_SETS}}


def _faults(error: ValidationError) -> Iterator[str]:
    seen = set()
    for fault in error.errors(include_url=False):
        # Members of a union appear as extra steps in the location: no key of the user's.
        location = [str(step) for step in fault["loc"] if step != "str" and "TinyModel" not in str(step)]
        where = ".".join(location) or "config"
        if fault["type"] == "string_type" and "str" in fault["loc"]:
            continue  # the other member of the union says what is wrong
        if fault["type"] == "extra_forbidden":
            known = _keys(RunConfig, fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            here = [key for key, paths in known.items() if paths == [key]]
            hint = f"did you mean {' or '.join(known[near[0]])}?" if near else f"known: {', '.join(here)}"
            line = f"{where}: unknown key; {hint}"
        elif fault["type"] == "value_error":
            line = f"{where}: {fault['ctx']['error']}"
        else:
            given = fault["input"]
            shown = f" (got {given!r})" if not isinstance(given, dict) and not _long(given) else ""
            line = f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}{shown}"
        # What is wrong in `reward` was laid under `gold`: it is said once.
        if line not in seen and re.sub(r"^gold\b", "reward", line) not in seen:
            seen.add(line)
            yield line


def _long(value: Any) -> bool:
    return len(repr(value)) > 80 or (isinstance(value, float) and math.isnan(value))


def _keys(section: Any, location: tuple[str | int, ...]) -> dict[str, list[str]]:
    """Key -> dotted paths of the keys known at a location of the tree: its own, and those of the sections in it."""
    for step in location:
        if _is_section(section) and step in section.model_fields:
            section = _section_of(section.model_fields[str(step)].annotation)
    if not _is_section(section):
        return {}
    known = {key: [key] for key in section.model_fields}
    for key, path in _nested(section):
        if key not in section.model_fields:
            known.setdefault(key, []).append(path)
    return known


def _nested(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of the sections inside a section, with their dotted paths from there."""
    for name, field in section.model_fields.items():
        if child := _section_of(field.annotation):
            inside = f"{prefix}{name}." + ("NAME." if get_origin(field.annotation) is dict else "")
            yield from ((key, inside + key) for key in child.model_fields)
            yield from _nested(child, inside)


def _section_of(annotation: Any) -> Any:
    """The Section inside an annotation such as `Section | None` or `dict[str, Section]`."""
    if _is_section(annotation):
        return annotation
    return next((part for part in map(_section_of, get_args(annotation)) if _is_section(part)), None)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
