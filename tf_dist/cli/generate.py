"""Generate text from a trained model, or predict what its task predicts.

    tf-dist generate --prompt 'def '       # the newest run
    tf-dist generate --run-dir runs/one --prompt ROMEO: --tokens 500
    tf-dist generate --prompt 'import ' --temperature 0   # greedy
    tf-dist generate --prompts FILE --beams 4  # JSON lines
    tf-dist generate --prompts reviews.csv    # of a run with --task

Exit codes: 0 done, 64 usage, 65 a character outside the model's vocabulary, or a bad line of FILE,
77 no usable checkpoint, 78 the run names code that no flag names, 141 the reader of the output has exited.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from tf_dist import progress, terminal
from tf_dist.cli.run_flags import INPUT_COLUMNS, add_column_flags, add_run_flags
from tf_dist.cli.task_predictions import RECORDINGS, write_predictions
from tf_dist.comm.runtime import thread_budget
from tf_dist.comm.runtime.log_handlers import shown_by
from tf_dist.comm.transport.base import SerialComm
from tf_dist.config.data import PACKED
from tf_dist.data.prompt import read_prompts, start_of_text
from tf_dist.data.tokenizer import Ids
from tf_dist.data.tokens import foreign_token, foreign_tokens_error
from tf_dist.decoding.beam_search import BeamSearch
from tf_dist.decoding.decode import decode_in_order
from tf_dist.decoding.sampling import Sampling
from tf_dist.errors import DataError, UsageError
from tf_dist.flags import Parser
from tf_dist.invocation import program, spelled
from tf_dist.tasks.causal_lm import CausalLM
from tf_dist.tasks.registry import task_of

if TYPE_CHECKING:
    from tf_dist.decoding.forward import CachedForward
    from tf_dist.run.load_run import LoadedRun

SAMPLING = ("temperature", "top_k", "top_p", "seed")
# Of a text, unless a flag says otherwise.
TOKENS = 200


def main(argv: list[str]) -> int:
    """Flags -> text on standard output; the exit code."""
    return terminal.exit_code_of(lambda: write(parse(argv)))


def write(flags: argparse.Namespace) -> int:
    """Print what the model makes of the prompts; the exit code."""
    thread_budget.set_threads(SerialComm())
    progress.begin(flags.progress)
    with progress.task("loading TensorFlow"):
        thread_budget.load_tensorflow()

    from tf_dist.run.load_run import load_run
    from tf_dist.runners.decoding_forward import forward_of_model

    strategy = strategy_of(flags)
    check_prompts(flags)
    with shown_by(terminal.write_error):
        with progress.task("reading the checkpoint"):
            run = load_run(flags.run_dir, flags.checkpoint, flags.model, flags.task)
        if task_of(run.config).name != CausalLM.name:
            return write_predictions(run, flags, strategy if strategy_is_given(flags) else None)
        check_no_task(flags)
        texts, count = prompts_of(flags), tokens_of(flags)
        prompts = [encoded(run, text, where) for where, text in texts]
        forward = forward_of_model(run.model, run.config.seq_len)
    if flags.prompts or len(prompts) > 1:
        return write_lines(run, forward, [text for _, text in texts], prompts, strategy, flags)
    if isinstance(strategy, BeamSearch):
        (made,) = decode_in_order(forward, prompts, strategy, count, run.tokenizer.end_of_text)
        terminal.write(run.tokenizer.decode([*map(int, prompts[0]), *made.ids]))
        return 0
    return write_one(run, forward, prompts[0], strategy, count)


def write_one(run: LoadedRun, forward: CachedForward, prompt: Ids, sampling: Sampling, count: int) -> int:
    """Print a prompt and its continuation, as it comes; the exit code."""
    from tf_dist.models.build import packed_end
    from tf_dist.run.generate import continuation
    from tf_dist.run.text_stream import whole_characters

    tokens = progressing(continuation(forward, prompt, count, sampling, packed_end(run.config)), count)
    first = list(islice(tokens, 1))  # takes the longest: the model is compiled
    terminal.write(run.tokenizer.decode([int(i) for i in prompt]), end="")
    for piece in whole_characters(run.tokenizer, prompt, chain(first, tokens)):
        if not terminal.write(piece, end=""):  # `| head` has what it wanted
            return terminal.CLOSED_PIPE
    terminal.write("")
    return 0


def write_lines(
    run: LoadedRun,
    forward: CachedForward,
    texts: Sequence[str | None],
    prompts: Sequence[Ids],
    strategy: Sampling | BeamSearch,
    flags: argparse.Namespace,
) -> int:
    """Print a JSON object for each prompt, in their order, as they come; the exit code."""
    end = run.tokenizer.end_of_text
    made = decode_in_order(forward, prompts, strategy, tokens_of(flags), end, flags.batch)
    with progress.task("generating", len(prompts), "texts") as task:
        for task.done, (text, one) in enumerate(zip(texts, made, strict=True), 1):
            row = {"prompt": text or "", "text": run.tokenizer.decode(one.ids), "tokens": len(one.ids)}
            row |= {"ended": one.ended, "log_probability": one.log_probability, "score": one.score}
            if not terminal.write(terminal.json_line(row)):
                return terminal.CLOSED_PIPE
    return 0


def strategy_of(flags: argparse.Namespace) -> Sampling | BeamSearch:
    """Sampling, or beam search with ``--beams``.

    Raises:
        UsageError: flags of the other one are given; or a value is out of range.
    """
    searches = flags.beams is not None
    sampling = {name: getattr(flags, name) for name in SAMPLING if getattr(flags, name) is not None}
    if searches and sampling:
        raise UsageError(f"--beams searches and draws nothing: leave out {_spelled(sampling)}")
    if not searches and flags.length_penalty is not None:
        raise UsageError("--length-penalty compares the texts of a beam search: add --beams 4")
    if not searches:
        return Sampling(**sampling)
    more = {} if flags.length_penalty is None else {"length_penalty": flags.length_penalty}
    return BeamSearch(flags.beams, **more)


def strategy_is_given(flags: argparse.Namespace) -> bool:
    """Whether a flag says how the next token is chosen."""
    return flags.beams is not None or any(getattr(flags, name) is not None for name in SAMPLING)


def tokens_of(flags: argparse.Namespace) -> int:
    """How many tokens a text has, at most."""
    return TOKENS if flags.tokens is None else flags.tokens


def check_no_task(flags: argparse.Namespace) -> None:
    """Raise UsageError for flags that are for the models of tasks."""
    if given := [name for name in (*INPUT_COLUMNS, "recordings") if getattr(flags, name)]:
        raise UsageError(f"{_spelled(given)}: for the model of a --task; {flags.run_dir} continues text")


def check_prompts(flags: argparse.Namespace) -> None:
    """Raise UsageError where prompts are given twice."""
    if flags.prompts and flags.prompt:
        raise UsageError("--prompt and --prompts are two ways to give prompts: leave one out")


def prompts_of(flags: argparse.Namespace) -> list[tuple[str, str | None]]:
    """The prompts with the places they are from, for error messages; None: the default one.

    Raises:
        DataError: the file cannot be read, or a line of it is no prompt.
    """
    if flags.prompts:
        return [(f"{flags.prompts}, line {line}", text) for line, text in read_prompts(flags.prompts)]
    return [("--prompt", text) for text in flags.prompt or [None]]


def encoded(run: LoadedRun, text: str | None, where: str) -> Ids:
    """The tokens of a prompt.

    Raises:
        DataError: the model's vocabulary lacks some of it; or nothing is given, and nothing begins a text.
    """
    if text is None:
        prompt = start_of_text(run.tokenizer)
        if run.config.documents == PACKED and run.tokenizer.end_of_text in prompt:
            raise DataError(
                "packed documents have no token that begins one: give at least a character, --prompt"
            )
    else:
        try:
            prompt = run.tokenizer.encode(text)
        except DataError as error:
            raise error if where == "--prompt" else DataError(f"{where}: {error}") from error
    if found := foreign_token(prompt, run.config.vocab_size):
        raise foreign_tokens_error(*found, run.config.vocab_size)
    return prompt


def _spelled(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def progressing(tokens: Iterator[int], count: int) -> Iterator[int]:
    """The tokens, with progress shown until there is text to be seen on the terminal."""
    with progress.task("compiling the model"):
        first = list(islice(tokens, 1))
    yield from first
    if progress.terminal_width(1):
        yield from tokens
        return
    with progress.task("generating", count, "tokens") as task:
        for task.done, token in enumerate(tokens, 2):
            yield token


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = Parser(
        spelled(__doc__ or ""), "[--run-dir FOLDER] [--prompt TEXT] [options]", program("generate")
    )
    add_run_flags(parser)
    _add_prompt_flags(parser)
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"number of tokens to generate, at most if text may end (several prompts, --beams) [{TOKENS}]",
    )
    _add_strategy_flags(parser)
    parser.add_argument("--progress", choices=progress.KINDS, default="auto", help=progress.HELP)
    return parser.parse_args(argv)


def _add_prompt_flags(parser: Parser) -> None:
    """What is continued, or predicted from."""
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue [a new line, or the start of a text], or the text, recording or image of a "
        "task; repeat it for a line of JSON each",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt in each line (.jsonl: a string, or an object with a prompt), or of a task a table; a "
        "line of JSON each",
    )
    add_column_flags(parser, INPUT_COLUMNS, "--prompts")
    parser.add_argument(
        "--recordings", metavar="FOLDER", help=f"where --task speak writes WAV files [{RECORDINGS}]"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", default=8, help="of several prompts, how many at once [8]"
    )


def _add_strategy_flags(parser: Parser) -> None:
    """How the next token is chosen."""
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="sampling temperature; 0: greedy [0.8]"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="sample from the k likeliest tokens; 0: all [0]"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="nucleus sampling: smallest set with this probability [1.0]",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the choices [1]")
    parser.add_argument(
        "--beams", type=int, metavar="N", help="beam search with N beams instead of sampling; text may end"
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help="of beam search: exponent of ((5 + tokens) / 6), which divides log probabilities [0.6]",
    )
