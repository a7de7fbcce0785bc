"""The trainings whose weights are compared with those of earlier releases, bit for bit.

Every model, update, grid, precision and compression that has one result takes part, some of them resumed by
other ranks. Left out is what has no single result: `downpour` with staleness, `easgd` with more than one
worker and `gossip` between ranks depend on who comes first.
"""

from dataclasses import dataclass

STEPS, HALF = 4, 2
# Launches in this order: a run that is resumed on more ranks, and one on fewer, is made before.
RANKS = (2, 4, 3, 1)

TRANSFORMER, LSTM = ("--model", "transformer"), ("--model", "lstm")
BFLOAT16 = ("--precision", "bfloat16")
DEEP = ("--layers", "2")
PIPELINE, TENSOR = ("--pipeline-parallel", "2"), ("--tensor-parallel", "2")
ZERO_BUBBLE = (*PIPELINE, "--pipeline-schedule", "zero-bubble")
GPIPE = (*PIPELINE, "--pipeline-schedule", "gpipe", "--recompute", "on")
SEQUENCE = ("--sequence-parallel", "2", "--dropout", "0")
MESSAGES = ("--allreduce", "messages")
SGD = ("--optimizer", "sgd", "--learning-rate", "0.1")


@dataclass(frozen=True)
class Case:
    """A training on some ranks.

    Attributes:
        name: of the run; with the ranks, the key in ``hashes.json``.
        ranks: that train it.
        flags: of ``scripts/train.py``, beside those that all runs have.
        alike: runs of one word here have the same weights, whatever the machine; "" where it is alone.
        resumes: the key of the run whose checkpoint of step `HALF` this one begins with.
    """

    name: str
    ranks: int
    flags: tuple[str, ...]
    alike: str = ""
    resumes: str = ""

    @property
    def key(self) -> str:
        """The name with the number of ranks."""
        return f"np{self.ranks} {self.name}"


def update(name: str, *more: str) -> tuple[str, ...]:
    return ("--update", name, *more)


def zero(stage: int) -> tuple[str, ...]:
    return update("zero", "--zero-stage", str(stage))


def compressed(kind: str, *more: str) -> tuple[str, ...]:
    return ("--compression", kind, *more)


POWERSGD = compressed("powersgd", "--compression-rank", "2")
TOPK = compressed("topk", "--compression-density", "0.1")
FRAGMENTS = ("--sync-every", "2", "--outer-fragments", "2", "--sync-warmup-steps", "1")

CASES = (
    # Synchronous data parallelism: one group of bits for each model and precision, whoever computes them.
    Case("transformer allreduce", 2, TRANSFORMER, "transformer"),
    Case("transformer messages", 2, (*MESSAGES, "--chunk-bytes", "4096"), "transformer"),
    Case("transformer overlap", 2, (*MESSAGES, "--overlap", "on"), "transformer"),
    Case("transformer master", 2, update("master"), "transformer"),
    Case("transformer zero 1", 2, zero(1), "transformer"),
    Case("transformer zero 1 messages", 2, (*zero(1), *MESSAGES), "transformer"),
    Case("transformer zero 2", 2, zero(2), "transformer"),
    Case("transformer zero 3", 2, zero(3), "transformer"),
    Case("transformer downpour 0", 2, update("downpour", "--staleness", "0"), "transformer"),
    Case("transformer allreduce", 4, TRANSFORMER, "transformer"),
    Case("transformer zero 3", 4, zero(3), "transformer"),
    Case("transformer allreduce", 3, TRANSFORMER, "transformer"),
    Case("transformer zero 2", 3, zero(2), "transformer"),
    Case("transformer allreduce", 1, TRANSFORMER, "transformer"),
    Case("transformer bfloat16 zero 1", 2, (*BFLOAT16, *zero(1)), "transformer bfloat16"),
    Case("transformer bfloat16 master", 3, (*BFLOAT16, *update("master")), "transformer bfloat16"),
    Case("transformer bfloat16", 1, BFLOAT16, "transformer bfloat16"),
    Case("transformer xla", 2, ("--xla", "on"), "transformer xla"),
    Case("transformer xla", 1, ("--xla", "on"), "transformer xla"),
    Case("lstm allreduce", 2, LSTM, "lstm"),
    Case("lstm zero 2", 2, (*LSTM, *zero(2)), "lstm"),
    Case("lstm zero 3", 4, (*LSTM, *zero(3)), "lstm"),
    Case("lstm master", 3, (*LSTM, *update("master")), "lstm"),
    Case("lstm allreduce", 1, LSTM, "lstm"),
    Case("lstm bfloat16 zero 2", 2, (*LSTM, *BFLOAT16, *zero(2)), "lstm bfloat16"),
    Case("lstm bfloat16", 1, (*LSTM, *BFLOAT16), "lstm bfloat16"),
    Case("transformer sgd zero 1", 2, (*SGD, *zero(1)), "transformer sgd"),
    Case("transformer sgd", 1, SGD, "transformer sgd"),
    # Grids.
    Case("transformer pipeline", 2, (*DEEP, *PIPELINE), "transformer pipeline"),
    Case("transformer gpipe", 2, (*DEEP, *GPIPE), "transformer pipeline"),
    Case("lstm zero-bubble", 2, (*LSTM, *DEEP, *ZERO_BUBBLE), "lstm pipeline"),
    Case("lstm interleaved", 2, (*LSTM, "--layers", "4", *PIPELINE, "--pipeline-schedule", "interleaved")),
    Case("transformer tensor", 2, (*DEEP, *TENSOR)),
    Case("lstm tensor zero 1", 2, (*LSTM, *DEEP, *TENSOR, *zero(1))),
    Case("transformer sequence", 2, SEQUENCE),
    Case("transformer 2x2x1", 4, (*DEEP, *PIPELINE)),
    Case("transformer 2x1x2 zero 1", 4, (*DEEP, *TENSOR, *zero(1))),
    Case("transformer 1x2x2", 4, (*DEEP, *PIPELINE, *TENSOR)),
    Case("lstm 1x2x2 bfloat16", 4, (*LSTM, *DEEP, *PIPELINE, *TENSOR, *BFLOAT16)),
    Case("lstm 2x2x1 zero 1", 4, (*LSTM, *DEEP, *PIPELINE, *zero(1)), "lstm pipeline"),
    Case("transformer data x sequence zero 1", 4, (*SEQUENCE, *zero(1))),
    # Updates that talk less: other bits on each number of ranks, and always the same ones.
    Case("transformer local-sgd", 2, update("local-sgd", "--sync-every", "2")),
    Case("lstm local-sgd fragments", 3, (*LSTM, *update("local-sgd", *FRAGMENTS))),
    Case("transformer diloco", 2, update("diloco", "--sync-every", "2", "--outer-precision", "bfloat16")),
    Case("lstm diloco", 3, (*LSTM, *update("diloco", "--sync-every", "2"))),
    Case("transformer diloco delay", 2, update("diloco", "--sync-every", "2", "--outer-delay", "1")),
    Case("transformer diloco tensor", 4, (*TENSOR, *update("diloco", "--sync-every", "2"))),
    Case("transformer diloco", 1, update("diloco", "--sync-every", "2")),
    Case("transformer easgd", 2, update("easgd", "--sync-every", "2")),
    Case("lstm gossip", 1, (*LSTM, *update("gossip")), "lstm"),
    # Compression.
    Case("transformer bf16", 2, compressed("bf16")),
    Case("transformer topk", 2, TOPK),
    Case("lstm topk momentum", 3, (*LSTM, *SGD, *TOPK, "--compression-momentum", "0.9")),
    Case("transformer powersgd", 2, POWERSGD),
    Case("lstm powersgd", 3, (*LSTM, *POWERSGD)),
    Case("transformer onebit", 2, compressed("onebit", "--compression-start", "2")),
    # Resumed by other ranks, on other grids, with other updates.
    Case("transformer zero 2 resumed", 4, zero(2), "transformer", "np2 transformer allreduce"),
    Case("transformer resumed", 3, TRANSFORMER, "transformer", "np4 transformer zero 3"),
    Case("transformer resumed", 1, TRANSFORMER, "transformer", "np2 transformer master"),
    Case("lstm zero 1 resumed", 3, (*LSTM, *zero(1)), "lstm", "np2 lstm zero 2"),
    Case("transformer pipeline as 1x2x2", 4, (*DEEP, *PIPELINE, *TENSOR), "", "np2 transformer pipeline"),
    Case("transformer 1x2x2 as one", 1, DEEP, "", "np4 transformer 1x2x2"),
    Case("lstm 2x2x1 as master", 3, (*LSTM, *DEEP, *update("master")), "", "np4 lstm 2x2x1 zero 1"),
    Case("transformer powersgd resumed", 3, POWERSGD, "", "np2 transformer powersgd"),
    Case("transformer diloco resumed", 1, update("diloco", "--sync-every", "2"), "", "np2 transformer easgd"),
)
