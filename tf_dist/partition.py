"""Block partition of work over ranks, and divisibility checks."""

from __future__ import annotations

from tf_dist.errors import UsageError


def must_divide(degree: int, what: str, number: int, option: str) -> None:
    """Refuse a degree of parallelism that does not divide a model, and say what would.

    Args:
        degree: of parallelism.
        what: is divided, for instance "heads".
        number: how many of them there are.
        option: sets the degree.

    Raises:
        UsageError: with the arithmetic, and the nearest values that work.
    """
    if number % degree == 0:
        return
    fits = [n for n in range(1, number + 1) if number % n == 0]
    near = sorted(sorted(fits, key=lambda n: (abs(n - degree), n))[:2])
    raise UsageError(
        f"{option} {degree} does not divide {what} {number} ({number} = {number // degree} x {degree} + "
        f"{number % degree}). Nearest that do: {' and '.join(map(str, near))}; or let {what} be "
        f"{(number // degree + 1) * degree}"
    )


def share(n_items: int, rank: int, size: int) -> range:
    """The block of ``range(n_items)`` that is this rank's: contiguous, and balanced to within one.

    Earlier ranks take the ones too many; with fewer items than ranks the last ranks get none.

    Raises:
        UsageError: a negative number of items, or ``rank`` is not in ``range(size)``.
    """
    if n_items < 0 or not 0 <= rank < size:
        raise UsageError(f"no share of {n_items} items for rank {rank} of {size}.")
    each, more = divmod(n_items, size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))
