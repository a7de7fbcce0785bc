"""What is said about a script that was run by plain Keras and by R ranks: the rule is written here, once.

An array is equal where no element differs by more than `TOLERANCE` times the larger of 1 and the largest
magnitude in plain Keras's array; NaN equals NaN. Names and shapes must be the same.
"""

from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-5
# Ranks hold one model, and read one log: they are compared with each other by the bits.
EQUAL, REFUSED = "equal", "refused"
DIFFERENT, LATE, CRASHED, HANG = "DIFFERENT", "REFUSED LATE", "CRASHED", "HANG"
INVALID = "INVALID"  # plain Keras itself fails: a fault of the script
GOOD = (EQUAL, REFUSED)


@dataclass(frozen=True)
class Verdict:
    """``word`` is one of the above; ``detail`` says what differs, or is the message."""

    word: str
    detail: str = ""

    @property
    def good(self):
        return self.word in GOOD


def difference(found, wanted):
    """How far an array is off, in units of its scale."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape:
        return np.inf
    if not wanted.size:
        return 0.0
    if not np.array_equal(np.isfinite(found), np.isfinite(wanted)):
        return np.inf
    finite = np.isfinite(wanted)
    scale = max(1.0, float(np.abs(wanted[finite]).max(initial=0.0)))
    return float(np.abs(found - wanted)[finite].max(initial=0.0)) / scale


def compared(ranks, plain, by_value=True):
    """The verdict over the results of all ranks, dictionaries of arrays.

    ``by_value`` False (layers that draw random numbers): ranks agree, and are finite where plain Keras is.
    """
    for rank, mine in enumerate(ranks):
        if mine.keys() != plain.keys():
            return Verdict(DIFFERENT, f"rank {rank} has results {sorted(mine.keys() ^ plain.keys())[:6]}")
    apart = [
        name for name in plain for mine in ranks[1:] if not np.array_equal(mine[name], ranks[0][name], True)
    ]
    if apart:
        rank = next(
            r for r, mine in enumerate(ranks) if not np.array_equal(mine[apart[0]], ranks[0][apart[0]], True)
        )
        off = difference(ranks[rank][apart[0]], ranks[0][apart[0]])
        return Verdict(DIFFERENT, f"ranks 0 and {rank} differ in {_few(apart)} by {off:.1e}")
    if not by_value:
        # A log of epochs without validation has NaN in plain Keras, too.
        wild = [name for name in plain if np.isfinite(plain[name]).all() > np.isfinite(ranks[0][name]).all()]
        return Verdict(DIFFERENT, f"not finite: {_few(wild)}") if wild else Verdict(EQUAL, "ranks agree")
    off = {name: difference(ranks[0][name], array) for name, array in plain.items()}
    wrong = sorted((name for name in off if not off[name] <= TOLERANCE), key=lambda name: -off[name])
    if wrong:
        return Verdict(DIFFERENT, ", ".join(f"{name} by {off[name]:.1e}" for name in wrong[:6]))
    return Verdict(EQUAL, f"{max(off.values(), default=0.0):.0e}")


def _few(names):
    names = list(dict.fromkeys(names))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
