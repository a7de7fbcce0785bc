"""Tokenize text, or the rows of a task, on disk, once, before a job on many ranks.

    tf-dist prepare                # the standard library's sources
    tf-dist prepare tinyshakespeare --tokenizer char
    tf-dist prepare --data 'books/**/*.txt' notes.md.gz
    tf-dist prepare --data reviews.csv --text-column body
    tf-dist prepare --task classify --data reviews.csv --seq-len 64

``tf-dist train`` with the same options reuses the prepared folder. Exit codes: 0 done, 64 usage,
65 bad data.
"""

from __future__ import annotations

from tf_dist import progress, terminal
from tf_dist.comm.runtime.log_handlers import shown_by
from tf_dist.config import Config
from tf_dist.data.prepared_dataset import Prepared
from tf_dist.data.registry import REGISTRY
from tf_dist.flags import flag_values, parser
from tf_dist.invocation import program, spelled
from tf_dist.run.prepare_corpus import OF_EXAMPLES, prepared

OPTIONS = (
    "data", "text_column", "tokenizer", "vocab_size", "val_fraction", "errors", "max_bytes", "prepared_dir",
    "seed", "progress", *OF_EXAMPLES,
)  # fmt: skip


def parse(arguments: list[str]) -> Config:
    """The flags, which are those of ``tf-dist train`` about data, as a configuration."""
    flags = parser(spelled(__doc__ or ""), OPTIONS, "[NAME ...] [--data PATH] [options]", program("prepare"))
    flags.add_argument("names", nargs="*", metavar="NAME", help="more values for --data")
    given = vars(flags.parse_args(arguments))
    names = given.pop("names")
    if names:
        given["data"] = [*names, *given.get("data", [])]
    return Config(**flag_values(given))


def report(corpus: Prepared) -> str:
    """The folder, and the facts a reader would ask for."""
    meta = corpus.meta
    lines = [str(corpus.path)]
    for side in ("train", "val"):
        documents, tokens, size = (meta[key][side] for key in ("documents", "tokens", "text_bytes"))
        if "rows" in meta:
            lines.append(f"{side:5} {documents:>13,} rows, {meta['counted'][side]:,} targets")
        else:
            lines.append(f"{side:5} {tokens:>13,} tokens, {size:>13,} bytes of text, {documents:,} documents")
    for one in meta.get("mixture", []):
        shares = ", ".join(f"{one['tokens'][side]:,} {side}" for side in ("train", "val"))
        lines.append(f"{one['weight']:5.3f} of {one['name']}: {shares} tokens")
    lines.append(f"tokenizer {meta['tokenizer_kind']}, {meta['vocab_size']:,} ids, stored as {meta['dtype']}")
    if meta.get("labels"):
        lines.append(f"labels {len(meta['labels']):,}")
    lines.extend(
        f"tokens of {side}s that were cut off: {count:,}"
        for side, count in meta.get("cut", {}).items()
        if count
    )
    left_out = {**meta["skipped"], "replaced bad bytes": meta["replaced"]}
    lines.extend(f"{name}: {count:,}" for name, count in left_out.items() if count)
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Prepare, report, and give the exit code."""
    return terminal.exit_code_of(lambda: _prepare(arguments))


def _prepare(arguments: list[str]) -> int:
    config = parse(arguments)
    progress.begin(config.progress)
    with shown_by(terminal.write):
        corpus = prepared(config, REGISTRY)
    progress.end()
    terminal.write(report(corpus))
    return 0
