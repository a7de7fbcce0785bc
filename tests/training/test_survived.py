"""Meeting in spite of deaths: nobody begins alone, and what was begun is begun again."""

import pytest

from tf_dist.errors import RankLost
from tf_dist.training.strategy_state import survived


class ReplicaGroup:
    """What ranks agree on, as written down beforehand; and what was done, in order."""

    def __init__(self, *agreed):
        self.agreed, self.done = list(agreed), []

    def regroup(self, fine=True):
        self.done.append(fine)
        return self.agreed.pop(0)


@pytest.mark.parametrize(
    ("agreed", "fails", "done"),
    [
        ([None, None], [], [True, "meet", True]),  # the usual case
        ([[2], None, None], [], [True, [2], True, "meet", True]),  # somebody had died before
        ([None, [1], None, None], ["meet"], [True, "meet", False, [1], True, "meet", True]),  # meanwhile
        ([None, [1], None, None], [], [True, "meet", True, [1], True, "meet", True]),  # only others noticed
        ([None, [], None, None], ["meet"], [True, "meet", False, [], True, "meet", True]),  # called back
        ([[2], [1, 3], None, None], [], [True, [2], True, [1, 3], True, "meet", True]),
    ],
)
def test_order(agreed, fails, done):
    group, fails = ReplicaGroup(*agreed), list(fails)

    def meet():
        group.done.append("meet")
        if fails:
            fails.pop()
            raise RankLost("rank 1 has died", [1])

    survived(group, meet, group.done.append)
    assert group.done == done and not group.agreed


def test_other_errors_are_not_swallowed():
    def meet():
        raise ValueError("not of a death")

    with pytest.raises(ValueError, match="not of a death"):
        survived(ReplicaGroup(None), meet, print)
