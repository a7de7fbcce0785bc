"""Flags and YAML files -> `Config`.

Order of precedence: defaults < the options of the run that ``--run-dir`` names < flags; with ``--config
FILE.yaml`` that file is in the run's place. Everything is derived from the fields of `Config`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tf_dist.config import FIELDS, Config
from tf_dist.errors import LaunchError, UsageError
from tf_dist.recipes import PRESETS, config_file, preset_file
from tf_dist.run_options import (
    CODE,
    RENAMED,
    check_named,
    in_its_own_folder,
    lies_in_a_run,
    renamed,
    still_hold,
)
from tf_dist.spelling import did_you_mean
from tf_dist.synonyms import hint, ours
from tf_dist.untrusted_files import CONFIG_LIMIT_BYTES, parsed_yaml, read_bytes, shown

# What arguments of an optimizer may be, out of a file: no lists in lists.
PLAIN = (str, bool, int, float, type(None))
# Headings of --help, in their order, and what else is to be known of a group.
GROUPS = {
    "task": "what is learnt",
    "columns of tables": "",
    "sound and images": "for --task transcribe, speak and caption",
    "data": "",
    "model": "",
    "transformer layers": "the defaults are GPT-2's",
    "attention": "of a Transformer; the defaults are GPT-2's",
    "batch and steps": "",
    "loss": "of training; validation has the plain cross-entropy",
    "optimizer": "",
    "fine-tuning": "weights from another training, and which of them are trained (docs/fine-tuning.md)",
    "strategy": "how ranks synchronize; the next groups apply to one strategy each",
    "local SGD and DiLoCo": "for --strategy local-sgd and diloco (--sync-every also for easgd and gossip)",
    "Downpour": "asynchronous parameter server, for --strategy downpour (--master-trains also for easgd)",
    "EASGD and gossip": "for --strategy easgd; gossip only has --sync-every",
    "parallelism": "model parallelism; the remaining ranks are data-parallel",
    "compression": "of gradients, for --strategy allreduce; of outer gradients, for local-sgd and diloco",
    "performance": "",
    "checkpoints and recovery": "",
    "checks": "consistency, non-finite gradients, loss spikes: detection and reaction",
    "output": "",
}
# Characters of choices beside a flag; more are told in its text.
MOST_CHOICES = 48
KINDS = {int: "N", float: "X", str: "NAME"}


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
        name = RENAMED.get(name, name)
        if name not in wanted:
            near = ours(name, [one.replace("_", "-") for one in wanted]).replace("-", "_")
            raise UsageError(
                f"{source}: unknown key {shown(key)}" + (f". Did you mean {near!r}?" if near else "")
            )
        if name in checked:
            raise UsageError(f"{source}: {name} is there twice, once as {shown(key)}")
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
    elif kind is str and isinstance(value, bool) and "on" in FIELDS[name].metadata["choices"]:
        return "on" if value else "off"  # as YAML 1.1 reads these words without quotes
    elif type(value) is kind:
        return value
    raise UsageError(f"{source}: {name} is {shown(value)}, which is not of type {_type_name(kind)}")


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

    Args:
        description: what it does, with an example.
        usage: what follows the program's name in the line of usage.
        prog: the program's name; empty: the file's.

    Raises:
        UsageError: from ``parse_args``, so that one rank can speak for all.
    """

    def __init__(self, description: str = "", usage: str = "[options]", prog: str = "", **more: Any) -> None:
        super().__init__(
            prog=prog or None,
            usage=f"%(prog)s {usage}",
            description=description or None,
            formatter_class=Formatter,
            allow_abbrev=False,
            **more,
        )

    def error(self, message: str) -> typing.NoReturn:
        """Raise what `argparse` would print, with a hint where a flag is nearly right or another tool's."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        words = [word.rstrip(":").split("=")[0] for word in message.split()]
        # Not -1, nor what quotes a value.
        unknown = [word for word in words if re.match(r"--?[A-Za-z]", word) and word not in flags]
        near = hint(unknown, flags)
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        raise UsageError(f"{message}{near} (see --help)")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, at most 100; indented lines of a description, its examples, as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for paragraph in text.strip().split("\n\n"):
            examples = paragraph.startswith(" ")
            filled.append(paragraph if examples else textwrap.fill(paragraph, width, break_on_hyphens=False))
        return textwrap.indent("\n\n".join(filled), indent)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """``--strategy, --update VALUE``, with the value once."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


def parser(
    description: str, names: Sequence[str] = (), usage: str = "[options]", prog: str = ""
) -> argparse.ArgumentParser:
    """Flags for the fields of `Config`: all of them, or those that are named."""
    made = Parser(description, usage, prog)
    fields = [field for field in FIELDS.values() if not names or field.name in names]
    present = {field.metadata["group"] for field in fields}
    headings = {
        group: made.add_argument_group(group, text or None)
        for group, text in GROUPS.items()
        if group in present
    }
    kinds = field_types()
    for field in fields:
        _add_flag(headings[field.metadata["group"]], field, kinds[field.name])
    return made


def _add_flag(heading: Any, field: dataclasses.Field[Any], kind: Any) -> None:
    flags = ["--" + name.replace("_", "-") for name in (field.name, *field.metadata["formerly"])]
    default = field.default if field.default is not dataclasses.MISSING else ""
    shown = " ".join(default) if isinstance(default, tuple) else default
    choices = "|".join(field.metadata["choices"])
    many = len(choices) > MOST_CHOICES
    text = choices.replace("|", ", ") + ": " if many else ""
    text += field.metadata["text"] + (f" [{shown}]" if shown != "" else "")
    settings: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is tuple:
        settings.update(nargs="+", metavar="SOURCE")
    elif typing.get_origin(kind) is dict:
        settings.update(type=_key_values, metavar="KEY=VALUE,...")
    else:
        metavar = field.metadata["metavar"] or KINDS[kind]
        settings.update(type=kind, metavar=metavar if many or not choices else choices)
    heading.add_argument(*flags, dest=field.name, **settings)


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


class CommandLine(NamedTuple):
    """What a command line says, before it is a `Config`.

    given: the options among its flags. file: that of ``--config``, or empty. only_print: ``--print-config``.
    preset: the file of ``--preset``, or empty. dry_run: ``--dry-run``.
    """

    given: dict[str, Any]
    file: str
    only_print: bool
    preset: str = ""
    dry_run: bool = False


def read_command_line(argv: Sequence[str], description: str, prog: str = "") -> CommandLine:
    """The flags of a training.

    Raises:
        UsageError: an unknown flag, or a value of another type.
        SystemExit: ``--help`` was asked for, and has been answered.
    """
    flags = parser(description, usage="[--data PATH] [--run-dir FOLDER] [options]", prog=prog)
    flags.add_argument(
        "--config", metavar="FILE.yaml", help="read options from a file, or `nanogpt`; flags override it"
    )
    flags.add_argument(
        "--preset", metavar="NAME", help=f"a kind of model, or a recipe, below all else: {', '.join(PRESETS)}"
    )
    flags.add_argument(
        "--dry-run",
        action="store_true",
        help="do all up to the first step, measure two, say time and memory, and stop",
    )
    flags.add_argument(
        "--print-config", action="store_true", help="print the resolved options as YAML and stop"
    )
    given = vars(flags.parse_args(list(argv)))
    path, preset = given.pop("config"), given.pop("preset")
    only_print, dry_run = given.pop("print_config"), given.pop("dry_run")
    file, below = config_file(path or ""), preset_file(preset or "")
    return CommandLine(flag_values(given), file, only_print, below, dry_run)


def options_of_run(line: CommandLine) -> dict[str, Any]:
    """The options of the run that ``--run-dir`` names and goes on with; nothing where there is none.

    Raises:
        UsageError: its config.yaml cannot be read.
        LaunchError: it names a user's code, and no flag does.
    """
    folder = line.given.get("run_dir", "")
    path = Path(folder) / "config.yaml"
    if line.file or not folder or line.given.get("resume") == "never" or not os.path.lexists(path):
        return {}
    of_run = read_config_file(str(path), follow=False)
    of_run = renamed(of_run)
    for option in CODE:
        if option not in line.given:
            check_named(str(of_run.get(option, "")), "", str(path), option)
    return still_hold(of_run, line.given)


def resolved(line: CommandLine, of_run: Mapping[str, Any]) -> Config:
    """The Config of a command line; what neither it nor its file says is as in a run (`options_of_run`).

    Raises:
        UsageError: see `from_mapping`.
        LaunchError: the file is a run's, and names a user's code that no flag names.
    """
    below = _typed(of_run, f"{line.given.get('run_dir', '')}/config.yaml")
    if line.file:
        below = _typed(read_config_file(line.file), line.file)
        if lies_in_a_run(Path(line.file)):
            for option in CODE:
                said, named = below.get(option, ""), line.given.get(option, "")
                check_named(str(said), str(named), line.file, option)
            below = in_its_own_folder(below, Path(os.path.realpath(line.file)))
    preset = _typed(read_config_file(line.preset), line.preset) if line.preset else {}
    return Config(**{**preset, **below, **line.given})


def from_command_line(argv: Sequence[str], description: str, prog: str = "") -> tuple[Config, bool]:
    """The Config that a command line asks for, and whether only to print it.

    Raises:
        UsageError: see `from_mapping`; also an unknown flag.
        SystemExit: ``--help`` was asked for, and has been answered.
    """
    line = read_command_line(argv, description, prog)
    return resolved(line, options_of_run(line)), line.only_print


def options_among(words: Sequence[str], component: type) -> dict[str, Any]:
    """Options of a component that a command line, and the file or run it names, ask for.

    Other words are passed over: they may be of a script that is not ours.

    Args:
        words: a script, its flags, and what else there may be.
        component: a dataclass of options.

    Raises:
        UsageError: one has no value, or one of another type.
    """
    names = [field.name for field in dataclasses.fields(component)]
    flags = parser("", (*names, "run_dir", "resume", *CODE))
    flags.add_argument("--config", default="")
    asked = [word for word in words if word not in ("-h", "--help")]
    given = vars(flags.parse_known_args(asked)[0])
    path = given.pop("config")
    line = CommandLine(flag_values(given), config_file(path), False)
    in_file: dict[str, Any] = {}
    with contextlib.suppress(UsageError, LaunchError):  # whoever reads all of it says what is wrong
        in_file = read_config_file(line.file) if line.file else options_of_run(line)
    wanted = {key: value for key, value in in_file.items() if str(key).replace("-", "_") in names}
    asked_for = {name: value for name, value in line.given.items() if name in names}
    return {**_typed(wanted, line.file), **asked_for}


def flag_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `parser` parsed, as the arguments of `Config`."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
