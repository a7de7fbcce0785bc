"""A run as a model of EleutherAI's lm-evaluation-harness (``pip install lm_eval``).

Every rank runs the harness on the same requests. Each answers its share of them, and all get all answers, so
that every rank has the harness's numbers and rank 0 prints them.

Tokens are made and scored as by the harness's own backend for Hugging Face: context and continuation are
encoded together, cut from the left to the model's window; an empty context is the token that begins a text.

Legend: B rows, T tokens of the model's window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tf_dist.comm.transport.base import Comm
from tf_dist.decoding.decode import decode
from tf_dist.decoding.sampling import Sampling, log_softmax
from tf_dist.partition import share
from tf_dist.run.load_run import LoadedRun
from tf_dist.runners.decoding_forward import forward_of_model

DEFAULT_TOKENS = 256


class Pair(NamedTuple):
    """Token ids of a context, and of what follows it, whose probability is asked for."""

    context: list[int]
    continuation: list[int]


class RunLM(LM):
    """`lm_eval.api.model.LM` of a run, over ranks.

    Args:
        run: a language model, loaded on every rank.
        comm: the ranks.
        batch: rows at once.
    """

    def __init__(self, run: LoadedRun, comm: Comm, batch: int = 16) -> None:
        super().__init__()
        self._run, self._comm, self._batch = run, comm, batch
        self._window = run.config.seq_len
        self._prefix = run.tokenizer.end_of_text

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the sum of log probabilities, and whether it is the greedy one."""
        return self._shared([self._encoded(*one.args) for one in requests], self._scored)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Of each text: the log probability of all of its tokens, in windows that do not overlap."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self._ids(text), prefix_token=self._prefix, max_seq_len=self._window, context_len=1
            )
            found = [Pair(*map(list, make_disjoint_window(one))) for one in windows]
            pairs += found
            owners += [number] * len(found)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._shared(pairs, self._scored), strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Greedy continuations, up to the first of the strings that end one."""
        forward = forward_of_model(self._run.model, self._window)
        made = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            count = int(options.get("max_gen_toks", DEFAULT_TOKENS))
            prompt = self._ids(context)[-max(1, self._window - count) :] or [self._prefix]
            made.append((prompt, until, count))
        return self._shared(made, lambda asked: (self._continued(forward, *one) for one in asked))

    def _continued(self, forward: Any, prompt: list[int], until: list[str], count: int) -> str:
        (found,) = decode(forward, [prompt], Sampling(temperature=0.0), count, self._prefix)
        text = self._run.tokenizer.decode(list(found.ids))
        for stop in filter(None, until):
            text = text.split(stop)[0]
        return text

    def _shared(self, asked: Sequence[Any], answer: Callable[[Sequence[Any]], Iterator[Any]]) -> list[Any]:
        """All answers, in order: this rank's share, and those of the others; a collective."""
        own = share(len(asked), self._comm.rank, self._comm.size)
        mine = list(answer(asked[own.start : own.stop]))
        everyone = self._comm.allgather_obj(mine, what="answers of the evaluation harness")
        return [tuple(one) if isinstance(one, list) else one for part in everyone for one in part]

    def _ids(self, text: str) -> list[int]:
        return [int(one) for one in self._run.tokenizer.encode(text)] if text else []

    def _encoded(self, context: str, continuation: str) -> Pair:
        """As the harness encodes a pair: spaces at the end of a context belong to what follows."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return Pair([self._prefix], self._ids(continuation))
        whole, own = self._ids(context + continuation), self._ids(context)
        return Pair(own, whole[len(own) :])

    def _scored(self, pairs: Sequence[Pair]) -> Iterator[tuple[float, bool]]:
        """The score of each pair, in batches of one shape."""
        for start in range(0, len(pairs), self._batch):
            batch = pairs[start : start + self._batch]
            x_BxT = np.full((self._batch, self._window), self._prefix, np.int32)
            spans = []
            for row, pair in enumerate(batch):
                ids = [*pair.context, *pair.continuation][-(self._window + 1) :]
                x_BxT[row, : len(ids) - 1] = ids[:-1]
                spans.append((len(ids) - 1 - len(pair.continuation), pair.continuation))
            logits_BxTxV = np.asarray(self._run.model(x_BxT, training=False), np.float32)
            for row, (first, wanted) in enumerate(spans):
                wanted = wanted[-self._window :]
                first = max(0, first)
                logits = logits_BxTxV[row, first : first + len(wanted)]
                scores = log_softmax(logits.astype(np.float64))
                places = np.arange(len(wanted))
                greedy = bool((logits.argmax(-1) == np.array(wanted)).all())
                yield float(scores[places, wanted].sum()), greedy
