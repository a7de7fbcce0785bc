"""Generate text from a trained model.

    tf-dist generate --prompt 'def '       # the newest run
    tf-dist generate --run-dir runs/one --prompt ROMEO: --tokens 500
    tf-dist generate --prompt 'import ' --temperature 0   # greedy

Exit codes: 0 done, 64 usage, 65 a character outside the model's vocabulary, 77 no usable checkpoint,
78 the run names code that --model does not, 141 the reader of the output has exited.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain, islice

from tf_dist import progress, terminal
from tf_dist.cli.run_flags import add_run_flags
from tf_dist.comm.runtime import thread_budget
from tf_dist.comm.runtime.log_handlers import shown_by
from tf_dist.comm.transport.base import SerialComm
from tf_dist.flags import Parser
from tf_dist.invocation import program, spelled


def main(argv: list[str]) -> int:
    """Flags -> text on standard output; the exit code."""
    return terminal.exit_code_of(lambda: write(parse(argv)))


def write(flags: argparse.Namespace) -> int:
    """Print the prompt and what the model makes of it, as it comes; the exit code."""
    thread_budget.set_threads(SerialComm())
    progress.begin(flags.progress)
    with progress.task("loading TensorFlow"):
        thread_budget.load_tensorflow()

    from tf_dist.data.prompt import start_of_text
    from tf_dist.data.tokens import foreign_token, foreign_tokens_error
    from tf_dist.run.generate import Sampling, generate
    from tf_dist.run.load_run import load_run

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    with progress.task("reading the checkpoint"), shown_by(terminal.write_error):
        run = load_run(flags.run_dir, flags.checkpoint, flags.model)
    prompt = start_of_text(run.tokenizer) if flags.prompt is None else run.tokenizer.encode(flags.prompt)
    if found := foreign_token(prompt, run.config.vocab_size):
        raise foreign_tokens_error(*found, run.config.vocab_size)
    ids = [int(i) for i in prompt]
    text = shown = run.tokenizer.decode(ids)
    tokens = progressing(
        generate(run.model, run.config.seq_len, prompt, flags.tokens, sampling), flags.tokens
    )
    first = list(islice(tokens, 1))  # takes the longest: the model is compiled
    read = terminal.write(shown, end="")
    for token in chain(first, tokens):
        ids.append(token)
        # A character may need several tokens: decode all, print what is new and whole.
        text = run.tokenizer.decode(ids)
        if not text.endswith(("\N{REPLACEMENT CHARACTER}", "\r")):
            read = terminal.write(text[len(shown) :], end="")
            shown = text
        if not read:  # `| head` has what it wanted
            return terminal.CLOSED_PIPE
    terminal.write(text[len(shown) :])
    return 0


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
    parser.add_argument(
        "--prompt", metavar="TEXT", help="text to continue [a new line, or the start of a text]"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", default=200, help="number of tokens to generate [200]"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="X", default=0.8, help="sampling temperature; 0: greedy [0.8]"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="N", default=0, help="sample from the k likeliest tokens; 0: all [0]"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        default=1.0,
        help="nucleus sampling: smallest set with this probability [1.0]",
    )
    parser.add_argument("--seed", type=int, metavar="N", default=1, help="of the choices [1]")
    parser.add_argument("--progress", choices=progress.KINDS, default="auto", help=progress.HELP)
    return parser.parse_args(argv)
