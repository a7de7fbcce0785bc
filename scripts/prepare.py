"""Turn text into tokens on disk, once, before a job that many ranks will start.

    python scripts/prepare.py                                    # the standard library's sources
    python scripts/prepare.py tinyshakespeare --tokenizer char
    python scripts/prepare.py --data 'corpus/**/*.txt' notes.md.gz --tokenizer bpe --vocab-size 8192
    python scripts/prepare.py --data reviews.csv --text-column body --val-fraction 0.05

``scripts/train.py`` with the same options finds the folder again. Exit codes: 0 done, 64 a flag that
cannot be right, 65 bad data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tf_dist.data import Prepared, prepare, resolve_sources
from tf_dist.errors import TfDistError, UsageError

REGISTRY = Path(__file__).resolve().parent.parent / "data" / "datasets.yaml"
DOWNLOADS = Path("data/downloads")


class _Parser(argparse.ArgumentParser):
    """Flags that end with the exit code of `UsageError`, like every other mistake in usage."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}. --help lists the flags.")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags. The defaults are those of ``scripts/train.py``."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="more values for --data")
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH|NAME",
        help="files, globs, folders, names of data/datasets.yaml, or stdlib (the default)",
    )
    parser.add_argument("--text-column", default="text", help="column of .csv .tsv .jsonl .parquet [text]")
    parser.add_argument("--tokenizer", default="bpe", help="byte, char, bpe, or a tokenizer.json [bpe]")
    parser.add_argument("--vocab-size", type=int, default=0, help="0: as many as needed, bpe: 2048 [0]")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="share kept for validation [0.1]")
    parser.add_argument("--seed", type=int, default=1, help="chooses the validation documents [1]")
    parser.add_argument(
        "--errors", default="strict", help="bytes that are no UTF-8: strict or replace [strict]"
    )
    parser.add_argument("--max-bytes", type=int, default=4_000_000, help="of stdlib; 0: all [4000000]")
    parser.add_argument("--prepared-dir", default="data/prepared", help="where it goes [data/prepared]")
    return parser.parse_args(arguments)


def report(prepared: Prepared) -> str:
    """The folder, and the facts a reader would ask for."""
    meta = prepared.meta
    lines = [str(prepared.path)]
    for side in ("train", "val"):
        documents, tokens, size = (meta[key][side] for key in ("documents", "tokens", "text_bytes"))
        lines.append(f"{side:5} {tokens:>13,} tokens, {size:>13,} bytes of text, {documents:,} documents")
    lines.append(f"tokenizer {meta['tokenizer_kind']}, {meta['vocab_size']:,} ids, stored as {meta['dtype']}")
    left_out = {**meta["skipped"], "replaced bad bytes": meta["replaced"]}
    lines.extend(f"{name}: {count:,}" for name, count in left_out.items() if count)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prepare, report, and give the exit code."""
    try:
        flags = parse(arguments)
        values = [*flags.names, *flags.data] or ["stdlib"]
        prepared = prepare(
            resolve_sources(values, REGISTRY, DOWNLOADS, print),
            text_column=flags.text_column,
            tokenizer=flags.tokenizer,
            vocab_size=flags.vocab_size,
            val_fraction=flags.val_fraction,
            seed=flags.seed,
            errors=flags.errors,
            max_bytes=flags.max_bytes,
            folder=Path(flags.prepared_dir),
            say=print,
        )
    except TfDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report(prepared))
    return 0


if __name__ == "__main__":
    sys.exit(main())
