"""Registry of strategies by name, and construction from flat options.

A name of the list, ``package.module:Class`` of a user, and an object all become a `Strategy` in the same way.
Flat options are those of flags and YAML files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tf_dist.errors import UsageError
from tf_dist.parallel.compress import COMPRESSORS
from tf_dist.spelling import did_you_mean
from tf_dist.strategies.allreduce import AllReduce
from tf_dist.strategies.base import Strategy
from tf_dist.strategies.compressed import Compressed
from tf_dist.strategies.diloco import DiLoCo
from tf_dist.strategies.downpour import Downpour
from tf_dist.strategies.easgd import EASGD
from tf_dist.strategies.gossip import Gossip
from tf_dist.strategies.local_sgd import LocalSGD
from tf_dist.strategies.parameter_server import ParameterServer
from tf_dist.strategies.zero import Zero
from tf_dist.users_code import imported

STRATEGIES: dict[str, type[Strategy]] = {
    one.name: one for one in (AllReduce, ParameterServer, Zero, LocalSGD, DiLoCo, Downpour, EASGD, Gossip)
}
NO_COMPRESSION = "none"


class FlatOption(NamedTuple):
    """An option of some strategies or compressors, in flags and files.

    default: of all owners; if they differ, 0 stands for the owner's own default. chooser: the option
    that chooses among these, "strategy" or "compression". owners: the names of those that have it, and their
    name for it.
    """

    default: Any
    metadata: Mapping[str, Any]
    chooser: str
    owners: dict[str, str]


def _declared() -> Iterator[tuple[str, str, dataclasses.Field[Any]]]:
    """Every option: its chooser, its owner, and its field."""
    for name, strategy in STRATEGIES.items():
        for field in dataclasses.fields(strategy.Options):
            yield "strategy", name, field
    for name, compressor in COMPRESSORS.items():
        for field in [*dataclasses.fields(compressor.Options), *dataclasses.fields(Compressed.Options)]:
            yield "compression", name, field


def _flat_options() -> dict[str, FlatOption]:
    found: dict[str, FlatOption] = {}
    usual: dict[str, dict[str, Any]] = {}
    for chooser, owner, field in _declared():
        name = field.metadata["flag"] or field.name
        option = found.setdefault(name, FlatOption(field.default, field.metadata, chooser, {}))
        option.owners[owner] = field.name
        usual.setdefault(name, {})[owner] = field.default
    for name, defaults in usual.items():
        if len(set(defaults.values())) > 1:
            each = ", ".join(f"{owner} {default}" for owner, default in defaults.items())
            text = f"{found[name].metadata['text']}; 0: {each}"
            found[name] = found[name]._replace(
                default=0, metadata={**found[name].metadata, "text": text, "least": 0}
            )
    return found


FLAT_OPTIONS = _flat_options()


def by_synchronization() -> str:
    """All names, by how often ranks synchronize, for ``--help``."""
    all_traits = {name: one().traits for name, one in STRATEGIES.items()}
    names = {
        "every step": [name for name, has in all_traits.items() if has.replicas_equal],
        "every N steps": [n for n, has in all_traits.items() if has.lockstep and not has.replicas_equal],
        "or asynchronously": [name for name, has in all_traits.items() if not has.lockstep],
    }
    return ", ".join(f"{pace} ({', '.join(found)})" for pace, found in names.items())


def strategy_of(wanted: Strategy | str, options: Mapping[str, Any]) -> Strategy:
    """Create a strategy.

    Args:
        wanted: itself, its name, or ``package.module:Class`` of a user's, whose code is imported.
        options: flat options by name; defaults are ignored. Also ``compression``.

    Raises:
        UsageError: unknown strategy; an option is not its own, or is invalid.
    """
    own, compression = own_options(str(wanted), options), options.get("compression", NO_COMPRESSION)
    if isinstance(wanted, Strategy) and (own["strategy"] or compression != NO_COMPRESSION):
        told = [*own["strategy"], *([] if compression == NO_COMPRESSION else ["compression"])]
        raise UsageError(
            f"{' and '.join(told)} beside an object of strategy {wanted}: give them to the object, as in "
            "DiLoCo(outer_lr=0.5) or Compressed(AllReduce(), PowerSGD(rank=4))"
        )
    strategy = wanted if isinstance(wanted, Strategy) else _made(wanted, own["strategy"])
    if compression == NO_COMPRESSION:
        return strategy
    if compression not in COMPRESSORS:
        near = did_you_mean(compression, list(COMPRESSORS))
        raise UsageError(
            f"compression is {compression!r}: choose one of {', '.join([NO_COMPRESSION, *COMPRESSORS])}{near}"
        )
    when = {field.name for field in dataclasses.fields(Compressed.Options)}
    of_compressor = {name: value for name, value in own["compression"].items() if name not in when}
    start = {name: value for name, value in own["compression"].items() if name in when}
    return Compressed(strategy, COMPRESSORS[compression](**of_compressor), **start)


def facts_of(wanted: Strategy | str) -> dict[str, Any]:
    """A requested strategy as plain values, which ranks compare before they create it."""
    options = wanted.facts() if isinstance(wanted, Strategy) else {}
    return {"strategy": str(wanted), "strategy options": options}


def own_options(strategy: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Split flat options that are not at their defaults into those of strategy and compressor.

    Args:
        strategy: its name.
        options: flat options by name, also ``compression``.

    Returns:
        Options of the strategy, and those of the compression, by chooser, under their own names.

    Raises:
        UsageError: one belongs to another strategy or compression.
    """
    chosen = {"strategy": strategy, "compression": options.get("compression", NO_COMPRESSION)}
    own: dict[str, dict[str, Any]] = {"strategy": {}, "compression": {}}
    for name, value in options.items():
        if name == "compression" or value == FLAT_OPTIONS[name].default:
            continue
        _, metadata, chooser, owners = FLAT_OPTIONS[name]
        if chosen[chooser] not in owners:
            if metadata["may_be_idle"]:
                continue
            raise UsageError(
                f"{name} is {value}, but {chooser} {chosen[chooser]} has no use for it: it belongs to "
                f"{chooser} {' and '.join(owners)}. Leave it out, or choose one of these"
            )
        own[chooser][owners[chosen[chooser]]] = value
    return own


def _made(name: str, options: Mapping[str, Any]) -> Strategy:
    if ":" in name:
        return users_strategy(name)
    if name not in STRATEGIES:
        near = did_you_mean(name, list(STRATEGIES))
        raise UsageError(
            f"unknown strategy {name!r}: {', '.join(STRATEGIES)}, or package.module:Class of your own{near}"
        )
    return STRATEGIES[name](**options)


def users_strategy(name: str) -> Strategy:
    """Create a user's strategy, ``package.module:Class``, without arguments; its code is imported.

    Raises:
        UsageError: it cannot be found, or is no `Strategy`.
    """
    wanted = imported(name, "--strategy")
    if not (isinstance(wanted, type) and issubclass(wanted, Strategy)):
        raise UsageError(f"--strategy {name} is no class of a tf_dist.strategies.Strategy")
    return wanted()
