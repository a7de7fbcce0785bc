"""Options of a component: fields of a frozen dataclass carry default, help and bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tf_dist.errors import UsageError
from tf_dist.spelling import did_you_mean

# What a resumed run may do with an option: it must be "same"; another value is "told"; or it is "free" to
# differ without a word. One "of a start" is free, and no start repeats it because it only names the run.
OnResume = Literal["same", "told", "free", "of a start"]


@dataclass(frozen=True)
class NoOptions:
    """Of a component that has none."""


def option(
    default: Any,
    group: str = "strategy",
    text: str = "",
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    flag: str = "",
    may_be_idle: bool = False,
    on_resume: OnResume = "told",
    metavar: str = "",
    formerly: tuple[str, ...] = (),
    names_code: bool = False,
) -> Any:
    """Declare an option of a component: the only home of its default, its help, its bounds and its rules.

    Args:
        default: where nobody says anything.
        group: the heading that it stands under in ``--help``.
        text: what it means.
        choices: what it may be; empty: anything of its type.
        least: the smallest value.
        most: the largest value.
        flag: its name as a field of `tf_dist.config.Config`; empty: that of the field.
        may_be_idle: it may be given where nothing that was chosen has it.
        on_resume: what a resumed run may do with it, see `OnResume`.
        metavar: what stands for its value in ``--help``; empty: a word for its type.
        formerly: older names, which flags and files may still use.
        names_code: a value with a colon names code of a user, which runs only where a command line names it.
    """
    metadata = {
        "group": group, "text": text, "choices": choices, "least": least, "most": most, "flag": flag,
        "may_be_idle": may_be_idle, "on_resume": on_resume, "metavar": metavar, "formerly": formerly,
        "names_code": names_code,
    }  # fmt: skip
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_value(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Refuse a value that an option cannot have by itself.

    Args:
        name: of the option.
        value: wanted.
        metadata: as `option` declares it: choices, least and most.

    Raises:
        UsageError: with the choices, or the bound.
    """
    choices, least = metadata["choices"], metadata["least"]
    if choices and value not in choices:
        near = did_you_mean(str(value), choices)
        raise UsageError(f"{name} is {value!r}: choose one of {', '.join(choices)}{near}")
    if least is not None and not value >= least:
        raise UsageError(f"{name} is {value}: it must be at least {least:g}")
    if metadata["most"] is not None and not value <= metadata["most"]:
        raise UsageError(f"{name} is {value}: it must be at most {metadata['most']:g}")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise UsageError(f"{name} is {value}: it must be finite")


class Options:
    """Base of a frozen dataclass of options: checks each value, then those that must hold together.

    Raises:
        UsageError: a value is out of range, or two values cannot hold together.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            check_value(field.metadata["flag"] or field.name, getattr(self, field.name), field.metadata)
        self.check()

    def check(self) -> None:
        """Refuse values that cannot hold together.

        Raises:
            UsageError: with values that can.
        """


class Configured:
    """Something with options: made of a frozen dataclass of them, or of some by name.

    Attributes:
        Options: the dataclass.
        name: for people and flags; that of the class where it has none.
        options: as given.

    Raises:
        UsageError: an option that it does not have, or a value that cannot be.
    """

    Options: ClassVar[type] = NoOptions
    name: ClassVar[str] = ""

    def __init__(self, options: Any = None, **given: Any) -> None:
        names = [field.name for field in dataclasses.fields(self.Options)]
        for name in given:
            if name not in names:
                has = f"its options are {', '.join(names)}" if names else "it has none"
                raise UsageError(f"{self} has no option {name!r}: {has}{did_you_mean(name, names)}")
        self.options = self.Options(**given) if options is None else options
        for field in dataclasses.fields(self.Options):
            if field.metadata:
                name = field.metadata["flag"] or field.name
                check_value(name, getattr(self.options, field.name), field.metadata)

    def __str__(self) -> str:
        return self.name or type(self).__name__

    def facts(self) -> dict[str, Any]:
        """Its options as plain values by name, which must be the same on all ranks."""
        return dict(vars(self.options))
