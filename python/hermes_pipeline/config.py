"""TOML to frozen dataclasses: an unknown key, a wrong type or a value out of range is an error."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hermes_pipeline.errors import UserError

Config = TypeVar("Config")

UNSET: Any = object()  # over a value of a recipe: it shall have none
COMMANDS = {"answers": "complete"}  # of the project's recipes; the others are for `train`
LARGEST_SEED = 2**31 - 1
INT64 = range(-(2**63), 2**63)  # what JSON and databases hold


@dataclass(frozen=True, slots=True)
class Range:
    """The values a number may take; use it as ``Annotated[int, Range(low=1)]``."""

    low: float | None = None
    high: float | None = None
    above: float | None = None  # an open lower end

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"between {self.low} and {self.high}"
        parts = [f"above {self.above}"] if self.above is not None else []
        parts += [f"at least {self.low}"] if self.low is not None else []
        parts += [f"at most {self.high}"] if self.high is not None else []
        return " and ".join(parts)


Count = Annotated[int, Range(low=1)]
Seed = Annotated[int, Range(low=0, high=LARGEST_SEED)]


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path that ends in .toml, or the name of one of the project's.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"no recipe file {name}; recipes of the project: {_listed()}")
        return path
    path = Path(str(resources.files("hermes_pipeline"))) / "recipes" / f"{name}.toml"
    if "/" in name or not path.is_file():
        close = difflib.get_close_matches(name, recipe_names(), n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"no recipe {name!r}; {meant}there are: {_listed()}, or name a .toml file")
    return path


def check_command(name: str | None, command: str) -> None:
    """Refuse a recipe of the project that is for another command.

    Raises:
        UserError: it is; the message lists those for this one.
    """
    names = recipe_names()
    theirs = COMMANDS.get(str(name), "train")
    if name in names and theirs != command:
        ours = [each for each in names if COMMANDS.get(each, "train") == command]
        there = f"take {', '.join(ours)}, or name" if ours else "name"
        raise UserError(f"recipe {name!r} is one of `hermes4 {theirs}`; {there} a .toml file")


def recipe_names() -> list[str]:
    """The recipes of the project, by name."""
    folder = Path(str(resources.files("hermes_pipeline"))) / "recipes"
    return sorted(path.stem for path in folder.glob("*.toml"))


def _listed() -> str:
    return ", ".join(recipe_names())


def load(
    cls: type[Config],
    name: str | None,
    settings: Sequence[str] = (),
    over: Mapping[str, Any] | None = None,
) -> Config:
    """Read a recipe into ``cls``, a dataclass whose fields are dataclasses: one for each section.

    Args:
        name: see `find_recipe`; None for a recipe that says nothing.
        settings: ``section.key=value`` over what the file says; the value is TOML, a bare word
            is a string.
        over: values by ``section.key`` over both; None says nothing, `UNSET` takes one away.

    Raises:
        UserError: no such recipe, or not TOML; unknown, missing or wrong keys; the message names
            file and key.
    """
    source, data = "settings", {}
    if name is not None:
        path = find_recipe(name)
        source, data = f"recipe {path.name}", _read(path)
    for setting in settings:
        _apply(data, setting, cls)
    for section, table in unflatten(over or {}).items():
        if isinstance(data.setdefault(section, {}), dict):
            whole = data[section] | table
            data[section] = {key: value for key, value in whole.items() if value is not UNSET}
    return build(cls, data, source)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path.name}: not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"recipe {path.name}: cannot be read: {error.strerror}") from None


def build(cls: type[Config], data: Mapping[str, Any], source: str) -> Config:
    """``cls`` from a table of tables, with every value checked."""
    sections = get_type_hints(cls)
    for name, table in data.items():
        if name not in sections:
            raise UserError(f"{source}: unknown section [{name}]{_meant(name, sections)}")
        if not isinstance(table, Mapping):
            raise UserError(f"{source}: [{name}] must be a section, not a value")
    values = {
        name: _section(section, data.get(name, {}), name, sections, source)
        for name, section in sections.items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def flatten(config: Any) -> dict[str, Any]:
    """Every setting of a config as ``section.key``."""
    return {
        f"{section.name}.{field.name}": getattr(getattr(config, section.name), field.name)
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what each setting that differs was and is, in words."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def unflatten(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A table of tables from what `flatten` gave; settings that are None are left out."""
    data: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        data.setdefault(section, {})
        if value is not None:
            data[section][key] = value
    return data


def _section(
    cls: type, table: Mapping[str, Any], section: str, sections: Mapping[str, Any], source: str
) -> Any:
    hints = get_type_hints(cls, include_extras=True)
    for key in table:
        if key not in hints:
            raise UserError(
                f"{source}: unknown key {key!r} in [{section}]{_place(key, hints, sections)}"
            )
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in table:
            name = f"{section}.{field.name}"
            values[field.name] = _value(table[field.name], hints[field.name], name, source)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{source}: {section}.{field.name} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{source}: [{section}] {error}") from None


def _value(value: Any, hint: Any, name: str, source: str) -> Any:
    """``value`` as ``hint`` asks for it."""
    limits: Range | None = None
    if get_origin(hint) is Annotated:
        hint, limits = get_args(hint)[:2]
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        assert len(options) == 1, f"{name}: only `X | None` is supported"
        return _value(value, options[0], name, source)
    if get_origin(hint) is tuple:
        several = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(each, get_args(hint)[0], name, source) for each in several)
    if get_origin(hint) is Mapping:
        if not isinstance(value, dict):
            raise UserError(f"{source}: {name} must be a table, got {value!r}")
        return value
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices or isinstance(value, bool):
            listed = ", ".join(repr(choice) for choice in choices)
            close = difflib.get_close_matches(str(value), map(str, choices), n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{source}: {name} is {value!r}, not one of {listed}{meant}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        wanted = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
        raise UserError(f"{source}: {name} must be {wanted[hint]}, got {value!r}")
    if hint is int and value not in INT64:
        raise UserError(f"{source}: {name} is {value}, which does not fit in 64 bits")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{source}: {name} is {value!r}, but must be a finite number")
    if limits is not None and value not in limits:
        raise UserError(f"{source}: {name} is {value!r}, but must be {limits}")
    return value


def _apply(data: dict[str, Any], setting: str, cls: type) -> None:
    """Put ``section.key=value`` into ``data``."""
    name, equals, text = setting.partition("=")
    section, dot, key = (part.strip() for part in name.partition("."))
    if not equals or not dot or not section or not key or "." in key:
        raise UserError(f"--set {setting}: write it as section.key=value")
    sections = get_type_hints(cls)
    if section not in sections:
        raise UserError(f"--set {setting}: unknown section {section!r}{_meant(section, sections)}")
    hints = get_type_hints(sections[section])
    if key not in hints:
        raise UserError(
            f"--set {setting}: unknown key {key!r} in [{section}]{_place(key, hints, sections)}"
        )
    table = data.setdefault(section, {})
    if not isinstance(table, dict):
        raise UserError(f"--set {setting}: [{section}] of the recipe is a value, not a section")
    table[key] = _parsed(text.strip())


def _parsed(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _place(key: str, hints: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """What a wrong key may have been meant for: a like one here, or the same one elsewhere."""
    for name, section in sections.items():
        if key in get_type_hints(section):
            return f"; it belongs to [{name}]"
    return _meant(key, hints)


def _meant(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
