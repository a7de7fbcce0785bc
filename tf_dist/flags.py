"""Flags and YAML files -> `Config`.

Order of precedence: defaults < ``--config FILE.yaml`` < flags. Everything is derived from the fields
of `Config`; nothing here knows one option from another.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tf_dist import terminal
from tf_dist.config import Config, did_you_mean
from tf_dist.errors import LaunchError, UsageError
from tf_dist.untrusted_files import CONFIG_LIMIT_BYTES, parsed_yaml, read_bytes, shown

# What arguments of an optimizer may be, out of a file: no lists in lists.
PLAIN = (str, bool, int, float, type(None))
# Who has one of these beside it is a run's file.
OF_A_RUN = ("checkpoints", "status.json", "metrics.jsonl", "in-use.json", "tokenizer.json")


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
            raise UsageError(f"{source}: unknown key {shown(key)}{did_you_mean(name, list(wanted))}")
        checked[name] = _convert(name, value, wanted[name], source)
    return checked


def _convert(name: str, value: Any, kind: Any, source: str) -> Any:
    """A YAML value as the field's type; only conversions that cannot surprise."""
    if typing.get_origin(kind) is tuple:
        parts = [value] if isinstance(value, str) else value
        if isinstance(parts, list | tuple) and parts and all(isinstance(part, str) for part in parts):
            return tuple(parts)
    elif typing.get_origin(kind) is dict:
        if isinstance(value, dict) and all(isinstance(one, PLAIN) for one in (*value, *value.values())):
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
    raise UsageError(f"{source}: {name} is {shown(value)}, which is not of type {_type_name(kind)}")


def _choices_of(name: str) -> tuple[str, ...]:
    """What an option may be; nothing where it may be anything of its type."""
    return next(tuple(f.metadata["choices"]) for f in dataclasses.fields(Config) if f.name == name)


def _type_name(kind: Any) -> str:
    return str(kind) if typing.get_origin(kind) else str(kind.__name__)


def read_config_file(path: str, *, follow: bool = True) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: of the file.
        follow: whether it may be a link; not where it lies in a run folder.

    Raises:
        UsageError: there is no such file, it is too large, or it is not a YAML mapping.
    """
    try:
        values = parsed_yaml(read_bytes(path, CONFIG_LIMIT_BYTES, follow=follow))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:  # also impossible dates, endless brackets
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
        return float(text) if "e" in text.lower() else _yaml_scalar(text)
    except ValueError:
        return _yaml_scalar(text)


def _yaml_scalar(text: str) -> Any:
    try:
        return parsed_yaml(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a value: {error}") from error


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
    if path and lies_in_a_run(Path(path)):
        check_named(str(from_file.get("model", "")), str(given.get("model", "")), path)
        from_file = _in_its_own_folder(from_file, Path(os.path.realpath(path)))
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


def check_named(model: str, named: str, source: str) -> None:
    """Let code of a user run only where this command line names it, never because a run's file does.

    Args:
        model: what the file says.
        named: by ``--model`` on the command line; empty: nothing.
        source: the file.

    Raises:
        LaunchError: the file names code that the command line does not.
    """
    if ":" in model and model != named:
        others = f"not {shown(named)}" if named else "and code runs only where the command line names it"
        raise LaunchError(
            f"{source} says that the model is made by {shown(model)}, {others}. If you trust that code, add "
            f"--model {shlex.quote(terminal.printable(model)[:200])}"
        )


def lies_in_a_run(path: Path) -> bool:
    """Whether a file lies in a run folder, which may have come from elsewhere: then it is data."""
    folders = (path.parent, Path(os.path.realpath(path)).parent)
    return any(os.path.lexists(folder / name) for folder in folders for name in OF_A_RUN)


def _in_its_own_folder(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The options of a run, meant for the folder that they lie in, wherever that has been since.

    ``resume`` held for the start that wrote them: to do it again would set aside what was done since.
    """
    if path.name != "config.yaml" or not os.path.lexists(path.parent / "checkpoints"):
        return values
    kept = {name: value for name, value in values.items() if name != "resume"}
    return {**kept, "run_dir": os.path.relpath(path.parent)} if "run_dir" in kept else kept


def flag_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `parser` parsed, as the arguments of `Config`."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
