"""Options of strategies and compressors, flat: default, help and bounds are in the file of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tf_dist.errors import UsageError
from tf_dist.options import Options, option
from tf_dist.parallel.compress import COMPRESSORS
from tf_dist.strategies.base import Setting, Strategy
from tf_dist.strategies.registry import (
    FLAT_OPTIONS,
    NO_COMPRESSION,
    STRATEGIES,
    by_synchronization,
    own_options,
    strategy_of,
)


def of_a_strategy(name: str) -> Any:
    """An option of strategies or compressors, as `FLAT_OPTIONS` has it."""
    option = FLAT_OPTIONS[name]
    return dataclasses.field(default=option.default, metadata=option.metadata)


@dataclass(frozen=True)
class StrategyOptions(Options):
    """How ranks synchronize, and what of a gradient they send."""

    strategy: str = option(
        "allreduce",
        "strategy",
        f"how ranks synchronize: {by_synchronization()}; or package.module:Class of your own",
        formerly=("update",),
        names_code=True,
    )
    zero_stage: int = of_a_strategy("zero_stage")
    staleness: int = of_a_strategy("staleness")
    staleness_aware: str = of_a_strategy("staleness_aware")
    master_trains: str = of_a_strategy("master_trains")
    sync_every: int = of_a_strategy("sync_every")
    elastic_force: float = of_a_strategy("elastic_force")
    sync_warmup_steps: int = of_a_strategy("sync_warmup_steps")
    outer_lr: float = of_a_strategy("outer_lr")
    outer_momentum: float = of_a_strategy("outer_momentum")
    outer_fragments: int = of_a_strategy("outer_fragments")
    outer_precision: str = of_a_strategy("outer_precision")
    outer_delay: int = of_a_strategy("outer_delay")
    compression: str = option(
        NO_COMPRESSION,
        "compression",
        "compression of the gradients (strategy allreduce) or outer gradients (local-sgd, diloco) that ranks "
        "sum; error feedback keeps what is not sent for the next sum",
        choices=(NO_COMPRESSION, *COMPRESSORS),
    )
    compression_rank: int = of_a_strategy("compression_rank")
    compression_least_rate: float = of_a_strategy("compression_least_rate")
    compression_density: float = of_a_strategy("compression_density")
    compression_momentum: float = of_a_strategy("compression_momentum")
    compression_start: int = of_a_strategy("compression_start")

    def chosen_strategy(self) -> Strategy:
        """A new object of the strategy that was chosen; of a user's, the code is imported.

        Raises:
            UsageError: it cannot be had, or options are not its own.
        """
        return strategy_of(self.strategy, self._flat())

    def check_setting(self, setting: Setting, on_spike: str) -> None:
        """Refuse options of another strategy than was chosen, and what it cannot work in.

        Of a user's strategy only the name is known: its code runs where somebody trains with it.

        Raises:
            UsageError: with the strategies that can.
        """
        if ":" in self.strategy:
            own_options(self.strategy, self._flat())
            return
        strategy = self.chosen_strategy()
        strategy.check(setting)
        if on_spike != "off" and not strategy.traits.replicas_equal:
            fit = [name for name, one in STRATEGIES.items() if one().traits.replicas_equal]
            raise UsageError(
                f"on_spike is {on_spike}, but with strategy {strategy} not all ranks take each step "
                f"together. Use --strategy {' or '.join(fit)}, or --on-spike off"
            )

    def _flat(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("compression", *FLAT_OPTIONS)}
