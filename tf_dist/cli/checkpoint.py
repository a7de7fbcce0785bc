"""Verify or show checkpoints; export weights to other formats, or import them.

    tf-dist checkpoint verify runs/latest     # checks every CRC
    tf-dist checkpoint show runs/latest       # the newest valid one
    tf-dist checkpoint convert runs/latest model.keras
    tf-dist checkpoint convert model.safetensors runs/new
    tf-dist checkpoint export runs/latest hf-folder
    tf-dist checkpoint export runs/latest model.onnx

Convert: TARGET ends in .safetensors, .weights.h5 or .keras; or PATH does, and TARGET is a run folder with a
config.yaml and no checkpoints. Export: TARGET is a new folder, with config.json, model.safetensors and
tokenizer.json, of a GPT-2, Llama, Mistral or Qwen model; or it ends in .savedmodel or .onnx: a graph.

Exit codes: 0; 64 usage; 77 a checkpoint is damaged (verify), or none is usable.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tf_dist.cli.questions import exit_code_of, parsed, shown
from tf_dist.cli.run_flags import add_code_flags
from tf_dist.errors import CheckpointError, UsageError
from tf_dist.flags import Parser
from tf_dist.invocation import command, spelled
from tf_dist.run import convert, inspect_checkpoint
from tf_dist.run.export import export_run


def main(argv: Sequence[str]) -> int:
    """Answer one question; the exit code."""
    return exit_code_of(lambda: _checkpoint(argv))


def _checkpoint(argv: Sequence[str]) -> int:
    flags = parsed(_parser(), argv)
    return shown(f"checkpoint {flags.question}", lambda: _answer(flags))


def _parser() -> Parser:
    parser = Parser(spelled(__doc__ or ""), "QUESTION PATH [TARGET] [options]", command("checkpoint"))
    parser.add_argument("question", choices=("verify", "show", "convert", "export"), help="see above")
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a run folder, its checkpoints folder, or a checkpoint"
    )
    parser.add_argument(
        "target", type=Path, nargs="?", metavar="TARGET", help="convert, export: what is written"
    )
    parser.add_argument(
        "--checkpoint", default="latest", metavar="latest|best|PATH", help="of a run: which one [latest]"
    )
    add_code_flags(parser)
    return parser


def _answer(flags: argparse.Namespace) -> tuple[str, int]:
    """What there is to say, and the exit code."""
    if flags.question == "convert":
        if flags.target is None:
            raise UsageError("convert takes two paths, as in: convert runs/latest model.safetensors")
        return convert.convert(flags.path, flags.target, flags.checkpoint, flags.model, flags.task), 0
    if flags.question == "export":
        if flags.target is None:
            raise UsageError("export takes two paths, as in: export runs/latest hf-folder")
        return export_run(flags.path, flags.target, flags.checkpoint, flags.model, flags.task), 0
    if flags.question == "show":
        return inspect_checkpoint.shown(flags.path), 0
    said, sound = inspect_checkpoint.verified(flags.path)
    return "\n".join(said), 0 if sound else CheckpointError.exit_code
