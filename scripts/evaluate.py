"""Measure a trained model on held-out text: loss, perplexity, accuracy, bits per byte.

    python scripts/evaluate.py               # the newest run, its held-out text
    mpirun -np 2 python scripts/evaluate.py --run-dir runs/one     # sooner
    python scripts/evaluate.py --run-dir runs/one --data other.txt

The last line is JSON. Exit codes: those of scripts/train.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tf_dist import progress
from tf_dist.comm import launch, threads
from tf_dist.flags import Parser

REGISTRY = Path(__file__).resolve().parent.parent / "data" / "datasets.yaml"


def main(argv: list[str]) -> None:
    """Read the run, prepare the text, evaluate on all ranks."""
    if {"-h", "--help"} & set(argv):
        launch.only_the_first_answers()
        parse(argv)
    comm = launch.join()
    flags = parse(argv)
    threads.set_threads(comm)
    progress.begin(flags.progress, comm.rank == 0)
    with progress.task("loading TensorFlow"):
        threads.load_tensorflow()

    from tf_dist.training import optimizers
    from tf_dist.training.corpus import shared_corpus
    from tf_dist.training.load import load_run
    from tf_dist.training.trainer import Trainer

    with progress.task("reading the checkpoint"):
        run = load_run(flags.run_dir, print if comm.rank == 0 else lambda line: None, flags.checkpoint)
    config = run.config
    if flags.data:
        tokenizer = str(Path(flags.run_dir) / "tokenizer.json")
        config = dataclasses.replace(config, data=tuple(flags.data), tokenizer=tokenizer, val_fraction=0.0)
    corpus = shared_corpus(config, comm, REGISTRY, lambda line: None)
    side = "train" if flags.data else "val"
    trainer = Trainer(
        run.model,
        optimizers.build(config, run.model, 1),
        comm,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_rows,
        seq_len=config.seq_len,
    )
    tokens = corpus.train if flags.data else corpus.val
    result = trainer.validate(tokens, corpus.meta["text_bytes"][side])
    if comm.rank == 0:
        what = " ".join(flags.data) if flags.data else "the held-out text of the run"
        print(f"step {run.step}, {what}: {corpus.meta['tokens'][side]:,} tokens")
        print(json.dumps({"step": run.step, **result}))


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = Parser(__doc__ or "", "[--run-dir FOLDER] [--data PATH] [options]")
    parser.add_argument(
        "--run-dir", default="runs/latest", metavar="FOLDER", help="folder of the run [runs/latest]"
    )
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="latest|best|PATH",
        help="latest, best (by validation loss), or a path [latest]",
    )
    parser.add_argument("--data", nargs="+", metavar="SOURCE", help="other text to evaluate on, all of it")
    parser.add_argument("--progress", choices=progress.KINDS, default="auto", help=progress.HELP)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
