"""Flags and YAML files -> `Config`.

Order of precedence: defaults < ``--config FILE.yaml`` < flags. Everything is derived from the fields
of `Config`; nothing here knows one option from another.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tf_dist.config import Config, did_you_mean
from tf_dist.errors import UsageError

CONFIG_BYTES_LIMIT = 1 << 20


def field_types() -> dict[str, Any]:
    """The Python type of every field."""
    return typing.get_type_hints(Config)


def from_mapping(values: Mapping[str, Any], source: str) -> Config:
    """A Config of defaults and ``values``.

    Args:
        values: field names and plain values, as read from YAML or JSON.
        source: what to call them in an error, for instance the file's name.

    Raises:
        UsageError: an unknown key, or a value of another type.
    """
    return Config(**_typed(values, source))


def _typed(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    wanted = field_types()
    checked = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in wanted:
            raise UsageError(f"{source}: unknown key {key!r}{did_you_mean(name, list(wanted))}")
        checked[name] = _convert(name, value, wanted[name], source)
    return checked


def _convert(name: str, value: Any, kind: Any, source: str) -> Any:
    """A YAML value as the field's type; only conversions that cannot surprise."""
    if typing.get_origin(kind) is tuple:
        parts = [value] if isinstance(value, str) else value
        if isinstance(parts, list | tuple) and parts and all(isinstance(part, str) for part in parts):
            return tuple(parts)
    elif typing.get_origin(kind) is dict:
        if isinstance(value, dict):
            return {str(key): item for key, item in value.items()}
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML reads 1e-3 (without a dot) as a string.
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif kind is str and isinstance(value, bool) and "on" in _choices_of(name):
        return "on" if value else "off"  # as YAML 1.1 reads these words without quotes
    elif type(value) is kind:
        return value
    raise UsageError(f"{source}: {name} is {value!r}, which is not of type {_type_name(kind)}")


def _choices_of(name: str) -> tuple[str, ...]:
    """What an option may be; nothing where it may be anything of its type."""
    return next(tuple(f.metadata["choices"]) for f in dataclasses.fields(Config) if f.name == name)


def _type_name(kind: Any) -> str:
    return str(kind) if typing.get_origin(kind) else str(kind.__name__)


def read_config_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UsageError: there is no such file, it is too large, or it is not a YAML mapping.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(CONFIG_BYTES_LIMIT + 1)
        if len(raw) > CONFIG_BYTES_LIMIT:
            raise UsageError(f"{path} is larger than {CONFIG_BYTES_LIMIT} bytes: is it a configuration file?")
        values = yaml.safe_load(raw)
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # impossible dates, endless brackets
        raise UsageError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds a {type(values).__name__}, not `key: value` lines")
    return values


class Parser(argparse.ArgumentParser):
    """Shows its description as written, takes no abbreviations, and raises instead of exiting.

    Raises:
        UsageError: from ``parse_args``, so that one rank can speak for all.
    """

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> typing.NoReturn:
        """Raise what `argparse` would print, with a hint where a flag is nearly right."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = [word.rstrip(":").split("=")[0] for word in message.split() if word.startswith("--")]
        hint = did_you_mean(unknown[0], flags) if unknown and unknown[0] not in flags else ""
        raise UsageError(f"{message}{hint} (see --help)")


def parser(description: str, names: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Flags for the fields of `Config`: all of them, or those that are named."""
    made = Parser(description)
    fields = [field for field in dataclasses.fields(Config) if not names or field.name in names]
    groups = dict.fromkeys(field.metadata["group"] for field in fields)
    headings = {group: made.add_argument_group(group) for group in groups}
    kinds = field_types()
    for field in fields:
        _add_flag(headings[field.metadata["group"]], field, kinds[field.name])
    return made


def _add_flag(heading: Any, field: dataclasses.Field[Any], kind: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    default = field.default if field.default is not dataclasses.MISSING else ""
    shown = " ".join(default) if isinstance(default, tuple) else default
    text = field.metadata["text"] + (f" [{shown}]" if shown != "" else "")
    settings: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is tuple:
        settings.update(nargs="+", metavar="SOURCE")
    elif typing.get_origin(kind) is dict:
        settings.update(type=_key_values, metavar="KEY=VALUE,...")
    else:
        settings.update(type=kind, metavar="|".join(field.metadata["choices"]) or kind.__name__.upper())
    heading.add_argument(flag, **settings)


def _key_values(text: str) -> dict[str, Any]:
    """``a=1,b=true`` as ``{"a": 1, "b": True}``; values are YAML scalars, and 1e-8 is a number."""
    pairs = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise argparse.ArgumentTypeError(f"{part!r} is not KEY=VALUE")
        pairs[key.strip()] = _scalar(value)
    return pairs


def _scalar(text: str) -> Any:
    """A YAML scalar, except that 1e-8 is a number, as it is everywhere but in YAML 1.1."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a value: {error}") from error
    except ValueError:
        return yaml.safe_load(text)


def from_command_line(argv: Sequence[str], description: str) -> tuple[Config, bool]:
    """The Config that flags and the file they name ask for, and whether only to print it.

    Raises:
        UsageError: see `from_mapping`; also an unknown flag.
        SystemExit: ``--help`` was asked for, and has been answered.
    """
    flags = parser(description)
    flags.add_argument("--config", metavar="FILE.yaml", help="read options from a file; flags override it")
    flags.add_argument(
        "--print-config", action="store_true", help="print the resolved options as YAML and stop"
    )
    given = vars(flags.parse_args(list(argv)))
    path, only_print = given.pop("config"), given.pop("print_config")
    from_file = _typed(read_config_file(path), path) if path else {}
    return Config(**{**from_file, **flag_values(given)}), only_print


def options_among(words: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Some options that a command line, and the file it names, ask for; all other words are passed over.

    Args:
        words: a script, its flags, and what else there may be.
        names: of fields of `Config`.

    Raises:
        UsageError: one has no value, or one of another type.
    """
    flags = parser("", names)
    flags.add_argument("--config")
    asked = [word for word in words if word not in ("-h", "--help")]
    given = vars(flags.parse_known_args(asked)[0])
    path = given.pop("config")
    in_file: dict[str, Any] = {}
    with contextlib.suppress(UsageError):  # whoever reads all of it says what is wrong
        in_file = read_config_file(path) if path else {}
    wanted = {key: value for key, value in in_file.items() if str(key).replace("-", "_") in names}
    from_file = _typed(wanted, path)
    return {**from_file, **flag_values(given)}


def flag_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `parser` parsed, as the arguments of `Config`."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
