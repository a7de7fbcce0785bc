"""Decoding: tokens per second with a cache, and without one, where each token takes the whole window.

One process. A text of T tokens is written from a prompt of one token, for several T and numbers of rows, by a
model with a window of T tokens. Without a cache every token costs the same, a forward pass of T tokens: so a
few are timed. Both are timed in turn, on the same weights; the ratio is between medians.

Legend: T tokens of a text and of the window.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.bench import models, plots, runner

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm

MODULE = "tf_dist.bench.decode"
FOLDER = runner.FOLDER / "decode"
LENGTHS = (64, 256, 1024)
ROWS = (1, 8)
# Tokens that are written without a cache, each time.
WITHOUT_CACHE = 4
ROUNDS, DROPPED = 3, 1


def main(words: Sequence[str] = ()) -> int:
    """Start a process for each model, and print what they found."""
    found: list[dict[str, Any]] = []
    for name in models.chosen(list(words)):
        print(f"1 process, {name} ...", flush=True)
        found += runner.measured(1, MODULE, name, folder=FOLDER)
    path = runner.save("decode", {"texts": found})
    print(f"\n{table(found)}\n\nin {path}\nand {picture(found, path.with_suffix('.png'))}")
    return 0


def table(found: list[dict[str, Any]]) -> str:
    """Tokens per second of all rows together, and what the cache makes of them."""
    head = ["model", "tokens", "rows", "cached tokens/s", "uncached tokens/s", "ratio"]
    rows = [
        [
            *(str(one[key]) for key in ("model", "tokens", "rows")),
            *(f"{one[key]:.0f}" for key in ("cached", "uncached")),
            f"{one['cached'] / one['uncached']:.1f}",
        ]
        for one in found
    ]
    return runner.table(head, rows)


def picture(found: list[dict[str, Any]], path: Path) -> Path:
    """Tokens per second; a panel for each model and number of rows."""
    panels = []
    for model, rows in dict.fromkeys((one["model"], one["rows"]) for one in found):
        these = [one for one in found if (one["model"], one["rows"]) == (model, rows)]
        ways = [(one, way) for one in these for way in ("uncached", "cached")]
        panels.append(
            plots.Bars(
                f"{model}, {rows} row{'s' * (rows > 1)}",
                [f"{one['tokens']} {way}" for one, way in ways],
                [one[way] for one, way in ways],
                [way == "cached" for _, way in ways],
            )
        )
    return plots.bars(path, "tokens per second", panels)


# On the rank -------------------------------------------------------------------------------------


def main_on_ranks(name: str, out: Path) -> None:
    """Measure a model; the tokens per second are left in a file."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect()
    found = [measure(comm, name, tokens, rows) for tokens in LENGTHS for rows in ROWS]
    out.write_text(json.dumps(found))


def measure(comm: Comm, name: str, tokens: int, rows: int) -> dict[str, Any]:
    """Tokens per second with and without a cache."""
    from tf_dist.config import Config
    from tf_dist.decoding.decode import decode
    from tf_dist.decoding.sampling import GREEDY
    from tf_dist.models.build import build
    from tf_dist.runners.cached_forward import CachedModel
    from tf_dist.runners.decoding_forward import window_forward_of_model

    sizes = {**models.RECIPES[name].sizes, "seq_len": tokens}
    model = build(Config(vocab_size=models.VOCABULARY, **sizes))
    cached, window = CachedModel(model, tokens), window_forward_of_model(model, tokens)
    prompts = [[row] for row in range(rows)]
    some = min(WITHOUT_CACHE, tokens)
    works = {
        "cached": lambda: decode(cached, prompts, GREEDY, tokens, batch=rows),
        "uncached": lambda: decode(window, prompts, GREEDY, some, batch=rows),
    }
    ms = runner.interleaved(comm, works, DROPPED + ROUNDS, DROPPED)
    return {
        **{"model": name, "tokens": tokens, "rows": rows},
        "cached": 1e3 * rows * tokens / ms["cached"],
        "uncached": 1e3 * rows * some / ms["uncached"],
        "ms": ms,
    }


if __name__ == "__main__":
    main_on_ranks(sys.argv[1], Path(sys.argv[2]))
