"""Continue what you type with a trained model, in the terminal or on a page.

    tf-dist chat                       # the newest run
    tf-dist chat runs/one --tokens 300
    tf-dist chat runs/one --serve      # http://127.0.0.1:8000

Each line is a prompt of its own; an empty line goes on with the last text. Ctrl-D ends it.

Exit codes: 0 done, 64 usage, 77 no usable checkpoint, 78 the run names code that no flag names.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tf_dist import progress, terminal
from tf_dist.cli.questions import exit_code_of, parsed
from tf_dist.cli.run_flags import add_code_flags
from tf_dist.comm.runtime.log_handlers import shown_by
from tf_dist.errors import DataError, UsageError
from tf_dist.flags import Parser
from tf_dist.invocation import command, spelled

if TYPE_CHECKING:
    from tf_dist.run.text_stream import TextStream

TOKENS, PORT = 200, 8000


def main(argv: list[str]) -> int:
    """Talk until the input ends; the exit code."""
    return exit_code_of(lambda: _chat(argv))


def _parser() -> Parser:
    parser = Parser(spelled(__doc__ or ""), "[RUN] [options]", command("chat"))
    parser.add_argument(
        "run", nargs="?", default="runs/latest", metavar="RUN", help="its folder [runs/latest]"
    )
    parser.add_argument(
        "--checkpoint", default="latest", metavar="latest|best|PATH", help="which one [latest]"
    )
    add_code_flags(parser)
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"of a continuation, at most [{TOKENS}]"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="of sampling; 0: greedy [0.8]"
    )
    parser.add_argument(
        "--serve", type=int, nargs="?", const=PORT, metavar="PORT",
        help=f"a page on this machine alone, in place of the terminal; 0: any free port [{PORT}]",
    )  # fmt: skip
    return parser


def _chat(argv: list[str]) -> int:
    flags = parsed(_parser(), argv)
    if flags.tokens < 1:
        raise UsageError(f"--tokens {flags.tokens}: at least 1")
    from tf_dist.run.generate import Sampling
    from tf_dist.run.load_run import load_run
    from tf_dist.run.text_stream import TextStream
    from tf_dist.runners.decoding_forward import forward_of_model
    from tf_dist.tasks.causal_lm import CausalLM

    sampling = Sampling(temperature=flags.temperature)
    with shown_by(terminal.write_error), progress.task("reading the checkpoint"):
        run = load_run(flags.run, flags.checkpoint, flags.model, flags.task)
        if run.config.task != CausalLM.name:
            raise UsageError(f"{flags.run} is of --task {run.config.task}: tf-dist generate predicts with it")
        stream = TextStream(run, forward_of_model(run.model, run.config.seq_len))
    if flags.serve is not None:
        return _serve(flags, stream)
    return talk(
        iter(sys.stdin.readline, ""), lambda text: stream(text, flags.tokens, sampling), sys.stdin.isatty()
    )


def talk(lines: Iterator[str], go_on: Callable[[str], Iterator[str]], at_terminal: bool) -> int:
    """Continue line after line; the exit code.

    Args:
        lines: typed, with their ends.
        go_on: the continuation of a text, in pieces.
        at_terminal: whether somebody is asked for the next line.
    """
    text = ""
    while True:
        if at_terminal:
            terminal.write("> ", end="")
        line = next(lines, "")
        if not line:
            return 0
        text = line.rstrip("\n") or text
        made = ""
        try:
            for piece in go_on(text):
                made += piece
                if not terminal.write(piece, end=""):
                    return terminal.CLOSED_PIPE
        except DataError as error:
            terminal.write_error(f"error: {error}")
        terminal.write("")
        text += made


def _serve(flags: argparse.Namespace, stream: TextStream) -> int:
    from tf_dist.run.chat_server import HOST, server

    serving = server(flags.serve, f"tf_dist: {flags.run}", stream, stream.check)
    terminal.write(f"http://{HOST}:{serving.server_address[1]}  (Ctrl-C ends it)")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=serving.shutdown).start())
    with serving:
        serving.serve_forever()
    return 0
