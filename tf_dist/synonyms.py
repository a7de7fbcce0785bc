"""Option names of other tools, for "did you mean" on the command line and in YAML files.

Names of PyTorch, Hugging Face, Megatron-LM, DeepSpeed, Lightning, nanoGPT, fairseq and Horovod's examples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tf_dist.invocation import command
from tf_dist.spelling import nearest

# An option of ours, and what others call it. A name that stands twice means the first that a program has.
_WORDS = """
tokens: max-new-tokens max-tokens num-tokens n-tokens length max-length new-tokens gen-length n
prompt: start text input prefix seed-text starting-text prompts p
temperature: temp t
top-k: k topk
top-p: topp nucleus nucleus-p
checkpoint: ckpt ckpt-path step load
run-dir: output-dir out-dir output out save-dir save log-dir logdir logging-dir checkpoint-dir ckpt-dir
    checkpoints-dir workdir work-dir experiment-dir exp-dir default-root-dir dump-folder job.dump-folder run
    folder dir model model-dir model-path model-name-or-path o
resume: resume-from resume-from-checkpoint load load-checkpoint load-dir restore checkpoint
    load-from ckpt ckpt-path continue continue-from restore-file auto-resume checkpoint.load-path
data: dataset datasets data-path data-dir train-file train-files train-data train-data-path corpus input
    input-file inputs text text-file file files dataset-name dataset-path data-file train-path data-root
    training.dataset i
text-column: text-field text-key column text-col content-column json-key json-keys field
val-fraction: val-split validation-split val-ratio valid-fraction validation-fraction test-size val-frac
    validation-split-percentage eval-fraction test-split dev-fraction split
tokenizer: tokenizer-name tokenizer-path tokenizer-type tokenizer-file tokenizer-model vocab-file tok
vocab-size: vocab n-vocab num-tokens vocabulary-size padded-vocab-size nvocab
prepared-dir: cache-dir cache tokens-dir
model: arch architecture model-name model-type model-name-or-path net network a m
layers: n-layer n-layers num-layers num-hidden-layers nlayers nlayer depth decoder-layers num-decoder-layers
    encoder-layers num-blocks n-blocks l
width: n-embd n-embed n-embedding hidden-size d-model dmodel dim model-dim hidden-dim embed-dim emb-dim
    embedding-dim embedding-size emb-size emsize rnn-size units num-units hidden-units rnn-units nhid d-hidden
    hidden n-hidden channels
heads: n-head n-heads num-heads num-attention-heads nhead nheads attention-heads decoder-attention-heads h
seq-len: block-size seq-length sequence-length max-seq-len max-seq-length max-length context-length
    context-size context n-ctx ctx window window-size bptt max-len maxlen n-positions max-position-embeddings
    tokens-per-sample model-max-length block seqlen training.seq-len seq t
dropout: drop dropout-rate drop-rate p-drop dropout-p hidden-dropout attn-dropout attention-dropout
    resid-pdrop attn-pdrop embd-pdrop
precision: dtype fp16 bf16 amp mixed-precision half float16 bfloat16 torch-dtype param-dtype data-type
    use-fp16 use-amp
global-batch-size: bs batch-size batch train-batch-size global-bs gbs total-batch-size batchsize
    mini-batch-size minibatch-size training.batch-size training.global-batch-size b
micro-batch-size: mbs micro-batch micro-bs per-device-train-batch-size per-device-batch-size device-batch-size
    per-gpu-batch-size per-gpu-train-batch-size local-batch-size train-micro-batch-size-per-gpu
    training.local-batch-size microbatch-size
steps: max-steps num-steps n-steps iters max-iters num-iters n-iters train-steps num-train-steps total-steps
    max-train-steps train-iters training-steps iterations num-iterations max-iterations max-update
    num-training-steps updates training.steps
epochs: num-epochs n-epochs num-train-epochs max-epochs max-epoch epoch nepochs nepoch e
seed: random-seed rng-seed manual-seed random-state
optimizer: optim opt optimiser optimizer-name optimizer.name
optimizer-args: beta1 beta2 beta-1 beta-2 betas adam-beta1 adam-beta2 adam-betas eps epsilon adam-epsilon
    adam-eps momentum nesterov rho optimizer-kwargs opt-args sgd-momentum
learning-rate: lr max-lr peak-lr base-lr init-lr initial-lr optimizer.lr eta
min-learning-rate: min-lr lr-min end-lr final-lr eta-min
schedule: lr-schedule lr-scheduler scheduler lr-scheduler-type lr-decay-style learning-rate-schedule sched
    lr-decay decay-lr
warmup-steps: warmup warmup-iters lr-warmup-steps num-warmup-steps lr-warmup-iters warmup-updates warmup-ratio
    lr-warmup-fraction warmup-epochs lr-scheduler.warmup-steps
weight-decay: wd l2 decay
clip-norm: grad-clip clip clip-grad max-grad-norm gradient-clipping gradient-clip clip-grad-norm
    gradient-clip-val grad-clip-norm max-norm clipnorm grad-norm global-clipnorm training.max-norm
strategy: update algorithm algo mode method parallel dist-strategy distributed-strategy ddp sync-mode
    distribution-strategy
zero-stage: zero stage zero-optimization-stage use-distributed-optimizer fsdp sharding-strategy
    distributed-optimizer
sync-every: sync-interval local-steps inner-steps communication-period period tau sync-steps
    average-every
outer-lr: outer-learning-rate server-lr
staleness: max-staleness max-delay
elastic-force: rho alpha moving-rate elasticity
init-from: finetune finetune-from init-checkpoint pretrained pretrained-model pretrained-path warm-start
    init-weights load-weights restore-weights
freeze: freeze-layers frozen freeze-params
lora-rank: lora lora-r lora-dim
lora-targets: target-modules lora-target-modules
layer-lr-decay: layerwise-lr-decay llrd layer-decay discriminative-lr layerwise-learning-rate-decay
lr-scale: lr-mult lr-multipliers layer-lr
tensor-parallel: tp tp-size tp-degree tensor-parallel-size tensor-model-parallel-size tensor-parallel-degree
    model-parallel-size model-parallel parallelism.tensor-parallel-degree
pipeline-parallel: pp pp-size pp-degree pipeline-model-parallel-size pipeline-parallel-size num-stages
    pipeline-parallel-degree pipeline
sequence-parallel: sp cp sp-size cp-size context-parallel context-parallel-size context-parallel-degree
    sequence-parallel-size ulysses-sequence-parallel-size
pipeline-schedule: pp-schedule pipeline-parallel-schedule
recompute: gradient-checkpointing activation-checkpointing recompute-activations recompute-granularity remat
    activation-checkpoint grad-checkpointing
compression: compress grad-compression gradient-compression compressor fp16-allreduce
compression-rank: powersgd-rank matrix-approximation-rank
compression-density: topk-ratio density sparsity compress-ratio
backend: comm-backend dist-backend distributed-backend communication-backend
overlap: overlap-grad-reduce overlap-comm
chunk-bytes: bucket-size bucket-cap-mb reduce-bucket-size allreduce-bucket-size fusion-threshold
    fusion-threshold-mb
xla: jit jit-compile compile torch-compile
threads-per-rank: threads num-threads n-threads intra-op-threads omp-num-threads nthreads num-intraop-threads
save-every: save-steps save-interval checkpoint-interval checkpoint-every ckpt-every save-freq save-iters
    checkpointing-steps ckpt-interval save-frequency checkpoint-freq checkpoint-steps checkpoint.interval
keep: save-total-limit keep-last keep-last-n max-checkpoints keep-checkpoints max-to-keep
async-save: async-checkpoint checkpoint.async-mode async-checkpointing
eval-every: eval-steps eval-interval val-every validate-every val-check-interval eval-freq validation-steps
    val-interval evaluation-steps evaluation-strategy eval-strategy test-every eval-iters
log-every: logging-steps log-interval log-steps log-freq print-every log-every-n-steps print-freq report-every
    print-interval disp-freq logging-freq metrics.log-freq
progress: verbose v disable-tqdm quiet no-progress progress-bar q silent show-progress
stall-abort: timeout nccl-timeout distributed-timeout-minutes ddp-timeout
config: config-file cfg conf yaml config-path job.config-file deepspeed-config deepspeed c
print-config: show-config dump-config print-options
"""
_RANKS = f"the number of ranks is the launcher's: mpirun -np N {command('train')}"
_DEVICES = "TensorFlow finds the devices by itself: leave it out"
_MICRO = "micro-batches are accumulated: --micro-batch-size is global batch / (ranks x accumulation steps)"
# What is no option here, and what to do instead.
_ADVICE = {
    **dict.fromkeys(
        ("np", "n", "nproc", "nproc-per-node", "num-processes", "num-gpus", "gpus", "world-size", "workers",
         "num-workers", "ranks", "devices", "nnodes", "num-nodes", "num-proc", "n-gpus"), _RANKS,
    ),
    **dict.fromkeys(
        ("device", "cuda", "gpu", "no-cuda", "cpu", "use-cpu", "use-gpu", "accelerator", "local-rank"),
        _DEVICES,
    ),
    **dict.fromkeys(
        ("gradient-accumulation-steps", "grad-accum", "grad-accum-steps", "accumulate-grad-batches",
         "accumulation-steps", "gradient-accumulation", "update-freq", "accum-steps", "grad-accumulation"),
        _MICRO,
    ),
}  # fmt: skip


def _table() -> dict[str, list[str]]:
    """Others' names, and for each what it may be here, in the order of `_WORDS`."""
    found: dict[str, list[str]] = {}
    for ours, words in re.findall(r"^(\S+):((?:\n? .*)+)", _WORDS, re.MULTILINE):
        for word in words.split():
            found.setdefault(word, []).append(ours)
    return found


TABLE = _table()


def ours(word: str, known: Sequence[str]) -> str:
    """Our name for what another tool calls ``word``, else the nearest of the known ones; empty if none.

    Args:
        word: a flag, or a key of a file; dashes and underscores are one.
        known: the names that may be answered, with dashes and without those in front.
    """
    name = plain(word)
    if name in known:
        return name
    for candidate in TABLE.get(name, []):
        if candidate in known:
            return candidate
    return nearest(name, known)


def advice(word: str) -> str:
    """What to do where another tool has an option that we have not; empty if there is nothing to say."""
    return _ADVICE.get(plain(word), "")


def plain(word: str) -> str:
    """An option's name: lower case, dashes for underscores, none in front."""
    return word.lstrip("-").replace("_", "-").lower()


def hint(words: Sequence[str], flags: Sequence[str]) -> str:
    """The end of an error about unknown flags: which ones are meant; empty where nobody knows.

    Args:
        words: the unknown flags, as they were typed.
        flags: those that the program has, with dashes in front.
    """
    known = [flag.lstrip("-") for flag in flags]
    meant, also = [], []
    for word in dict.fromkeys(words):
        exact = plain(word) in known or any(name in known for name in TABLE.get(plain(word), []))
        if not exact and (said := advice(word)):
            also.append(f"{word}: {said}.")
        elif found := ours(word, known):
            meant.append((word, "--" + found))
    if len(meant) == 1 and len(words) == 1:
        return f". Did you mean {meant[0][1]!r}?"
    sentences = also
    if meant:
        sentences = [f"Did you mean {', '.join(f'{flag!r} for {word}' for word, flag in meant)}?", *also]
    return ". " + " ".join(sentences) if sentences else ""
