"""Greedy, sampled and beam decoding of batches, against one row at a time and against all continuations."""

import itertools

import numpy as np
import pytest
from thread_comm import on_ranks

from tf_dist.decoding.beam_search import BeamSearch, _largest, beam_search
from tf_dist.decoding.decode import decode, sample
from tf_dist.decoding.forward import WindowForward
from tf_dist.decoding.rows import DecodedRows
from tf_dist.decoding.sampling import GREEDY, Sampling, log_softmax
from tf_dist.errors import UsageError

V, T, END = 5, 12, 4
RANDOM = np.random.default_rng(5)
WEIGHTS = RANDOM.standard_normal((T, V, V)) * 1.5


def logits_of(window):
    """Logits after some tokens: each counts, by its distance from the last one."""
    return sum(WEIGHTS[back, token] for back, token in enumerate(window[::-1]))


class Counting:
    """A model with a cache, in NumPy: each row's tokens. It counts, and sees that it is asked what is new."""

    lockstep = False

    def __init__(self, limit=T, longest=T):
        self.limit, self.longest, self.calls = limit, longest, []

    def begin(self, batch, length):
        self.length = length
        return [[] for _ in range(batch)]

    def __call__(self, x_BxN, start_B, count_B, state):
        assert x_BxN.dtype == np.int32 and x_BxN.shape[1] <= self.longest
        self.calls.append(x_BxN.shape)
        made = []
        for row, x_N, start, count in zip(state, x_BxN, start_B, count_B, strict=True):
            assert 0 <= start <= len(row)
            assert self.limit is None or start + count <= self.length <= self.limit
            row[start:] = [int(i) for i in x_N[:count]]
            made.append(logits_of(row[-T:]))
        return np.array(made, np.float32), state

    def select(self, state, rows):
        return [list(state[row]) for row in rows]

    @property
    def computed(self):
        return sum(rows * new for rows, new in self.calls)


def window():
    """The same model without a cache."""

    def logits_at(x_BxT, place_B):
        pairs = zip(x_BxT, place_B, strict=True)
        return np.array([logits_of(x_T[: place + 1]) for x_T, place in pairs], np.float32)

    return WindowForward(logits_at, T)


PROMPTS = [[0], [1, 2, 3], [2, 2], [3, 0, 1, 2], [1]]
STRATEGIES = [
    GREEDY,
    Sampling(1.0, seed=7),
    Sampling(0.7, top_k=3, top_p=0.9),
    BeamSearch(3),
    BeamSearch(2, 1.0),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("end", [None, END])
def test_rows_do_not_depend_on_the_batch(strategy, end):
    alone = [decode(Counting(), [prompt], strategy, 6, end)[0] for prompt in PROMPTS]
    for batch in (1, 2, 3, 8):
        found = decode(Counting(), PROMPTS, strategy, 6, end, batch)
        if isinstance(strategy, BeamSearch) or not strategy.temperature:
            assert [one.ids for one in found] == [one.ids for one in alone]
        if batch == 1:
            first = found
        assert [one.ids for one in found] == [one.ids for one in first]
        np.testing.assert_allclose([one.score for one in found], [one.score for one in first], atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("count", [4, 3 * T])
def test_a_cache_changes_nothing_even_where_the_window_slides(strategy, count):
    for end in (None, END):
        cached, plain = (decode(one, PROMPTS, strategy, count, end) for one in (Counting(), window()))
        assert [one.ids for one in cached] == [one.ids for one in plain]
        assert any(len(one.ids) == count for one in cached) or end


def test_rows_draw_their_own_numbers():
    equal = [[1]] * 4
    made = decode(Counting(), equal, Sampling(1.0, seed=3), 10)
    assert len({one.ids for one in made}) == 4
    assert decode(Counting(), equal[:1], Sampling(1.0, seed=3), 10)[0] == made[0]
    assert decode(Counting(), equal, Sampling(1.0, seed=4), 10) != made


def test_the_first_row_draws_what_a_seed_alone_draws():
    for seed in (1, 2**40 + 3):
        draws = np.random.default_rng(seed).random(8)
        np.testing.assert_array_equal(Sampling(seed=seed).generator(0).random(8), draws)
        assert not np.array_equal(Sampling(seed=seed).generator(1).random(8), draws)


def test_linear_in_the_tokens():
    """Positions that are computed: the prompt once, and each token but the last one."""
    for count in (1, 10, 100):
        forward = Counting(limit=128, longest=128)
        decode(forward, [[1, 2, 3, 0]], GREEDY, count)
        assert forward.computed == 4 + count - 1
        assert forward.calls == [(1, 4)] + [(1, 1)] * (count - 1)
    rows = DecodedRows(Counting(limit=128, longest=128), [[1, 2, 3], [1]], 9)
    assert rows.computed == 8  # padded to a power of 2


def test_a_window_that_slides_is_computed_again():
    forward = Counting()
    decode(forward, [[1]], GREEDY, T + 3)
    assert forward.calls == [(1, 1)] * T + [(1, T)] * 3


def test_without_a_limit_a_long_prompt_comes_in_pieces_and_nothing_again():
    forward = Counting(limit=None)
    prompts = [list(RANDOM.integers(0, V, 2 * T + 3)), [2]]
    made = decode(forward, prompts, GREEDY, 2 * T)
    assert forward.calls == [(2, T), (2, T), (2, 4)] + [(2, 1)] * (2 * T - 1)
    alone = [decode(Counting(limit=None), [prompt], GREEDY, 2 * T)[0] for prompt in prompts]
    assert [one.ids for one in alone] == [one.ids for one in made]


def test_an_ended_row_has_neither_the_end_nor_what_follows():
    forward = Counting()
    made = decode(forward, PROMPTS, Sampling(1.0, seed=2), 8, END)
    assert {one.ended for one in made} == {True, False}
    assert not any(END in one.ids for one in made)
    assert all(len(one.ids) == 8 for one in made if not one.ended)
    for prompt, one in zip(PROMPTS, made, strict=True):
        assert one.log_probability == pytest.approx(log_of(prompt, (*one.ids, *[END] * one.ended)), abs=1e-4)


def test_no_call_after_all_rows_have_ended():
    forward = Counting()
    steps = list(sample(forward, [[1], [3]], GREEDY, 50, END))
    last = max(step for step, (new_B, _) in enumerate(steps) if END in new_B)
    assert last == len(steps) - 1 == len(forward.calls) - 1 < 49


def log_of(prompt, ids):
    """The log probability of a continuation."""
    text, total = list(prompt), 0.0
    for token in ids:
        total += log_softmax(logits_of(text[-T:]).astype(np.float32).astype(np.float64)[None])[0, token]
        text.append(token)
    return total


def everything(prompt, count, end):
    """All continuations, with their log probabilities."""
    for length in range(1, count + 1):
        for ids in itertools.product(range(V), repeat=length):
            if end is None:
                if length == count:
                    yield ids, log_of(prompt, ids), False
            elif end not in ids[:-1] and (ids[-1] == end or length == count):
                yield ids, log_of(prompt, ids), ids[-1] == end


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("end", [None, END])
def test_beams_enough_for_all_continuations_find_the_best(length_penalty, end):
    count, search = 4, BeamSearch(V**3, length_penalty)
    found = beam_search(Counting(), PROMPTS, search, count, end)
    for prompt, one in zip(PROMPTS, found, strict=True):
        scored = [
            (log / ((5 + len(ids)) / 6) ** length_penalty, ids, ended)
            for ids, log, ended in everything(prompt, count, end)
        ]
        score, ids, ended = max(scored)
        assert one.score == pytest.approx(score, abs=1e-4)
        assert (*one.ids, *[END] * one.ended) == ids and one.ended == ended


def plain_beam_search(prompt, K, length_penalty, count, end):
    """As in the paper, with lists, and to the end: nothing stops before."""
    live, ended = [(0.0, [])], []
    for length in range(1, count + 1):
        more = [(total + log_of([*prompt, *ids], [t]), [*ids, t]) for total, ids in live for t in range(V)]
        more.sort(key=lambda one: -one[0])
        ended += [(log, ids, length) for log, ids in more[:K] if ids[-1] == end]
        live = [one for one in more if one[1][-1] != end][:K]
    ended += [(log, ids, count) for log, ids in live]
    return max((log / ((5 + length) / 6) ** length_penalty, ids) for log, ids, length in ended)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("beams", [1, 2, 3])
def test_few_beams_find_what_the_plain_algorithm_finds(beams, length_penalty):
    for prompt in PROMPTS:
        (one,) = beam_search(Counting(), [prompt], BeamSearch(beams, length_penalty), 7, END)
        score, ids = plain_beam_search(prompt, beams, length_penalty, 7, END)
        assert one.score == pytest.approx(score, abs=1e-4)
        assert list(one.ids) == ids[: len(one.ids)] and one.ended == (END in ids)


def test_one_beam_without_an_end_is_greedy():
    greedy, searched = (decode(Counting(), PROMPTS, how, 9) for how in (GREEDY, BeamSearch(1)))
    assert [one.ids for one in greedy] == [one.ids for one in searched]


def test_a_search_stops_when_nothing_can_become_better():
    """All probability is on the end: one step, however many tokens there may be."""

    class Ending(Counting):
        def __call__(self, x_BxN, start_B, count_B, state):
            logits_BxV, state = super().__call__(x_BxN, start_B, count_B, state)
            logits_BxV[:, END] += 100
            return logits_BxV, state

    forward = Ending()
    made = decode(forward, PROMPTS, BeamSearch(2), 1000, END)
    assert forward.calls == [(5, 4)]
    assert all(one == ((), pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6), True) for one in made)


@pytest.mark.parametrize("values", [{"beams": 0}, {"length_penalty": -0.1}, {"length_penalty": float("nan")}])
def test_values_out_of_range(values):
    with pytest.raises(UsageError, match="beams"):
        BeamSearch(**values)


@pytest.mark.parametrize("how", [{"count": 0}, {"batch": 0}])
def test_nothing_to_do_is_refused(how):
    with pytest.raises(UsageError, match="at least one token"):
        decode(Counting(), PROMPTS, GREEDY, **{"count": 3, **how})


def test_an_empty_prompt_is_refused():
    with pytest.raises(UsageError, match="prompt is empty"):
        decode(Counting(), [[1], []], GREEDY, 3)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_share_the_rows_and_all_have_all_results(size):
    sampling = Sampling(1.0, seed=3)
    alone = decode(Counting(), PROMPTS, sampling, 6, END, batch=2)

    def rank(comm):
        forward = Counting()
        return decode(forward, PROMPTS, sampling, 6, END, 2, comm), len(forward.calls)

    found = on_ranks(size, rank)
    assert [made for made, _ in found] == [alone] * size
    assert [calls > 0 for _, calls in found] == [at < len(PROMPTS) for at in range(size)]


def test_ranks_that_must_keep_step_decode_all_rows():
    def rank(comm):
        forward = Counting()
        forward.lockstep = True
        return decode(forward, PROMPTS, GREEDY, 6, END, 2, comm), forward.calls

    (first, calls), (second, others) = on_ranks(2, rank)
    assert first == second == decode(Counting(), PROMPTS, GREEDY, 6, END, 2) and calls == others


def test_the_largest_come_first_and_of_equal_ones_the_first():
    values = np.array([1.0, 3.0, -np.inf, 3.0, 2.0])
    assert _largest(values, 4).tolist() == [1, 3, 4, 0]
    assert _largest(values, 9).tolist() == [1, 3, 4, 0, 2]
