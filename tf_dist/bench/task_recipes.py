"""What `tf_dist.bench.tasks` trains: for each row of its table the data, flags, baselines and goals.

Sizes are meant for less than ten minutes on two cores. docs/tasks.md says which have been measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tf_dist.bench.task_baselines import Baseline, commonest, copied, lead, linear, overlapping, word_table

# The baseline that is a training of its own: the same flags, without the weights of the first training.
SCRATCH = "from scratch"
# What `evaluate` does not say: the share of words that the recogniser of `transcribe` reads in spoken texts.
WORDS_READ = "words_read"
LINEAR = "TF-IDF, logistic"


@dataclass(frozen=True)
class Goal:
    """A figure to reach. Either a number, or what a baseline has: more, or by a factor or a sum.

    Args:
        key: of the metric, as in ``metrics.jsonl``.
        baseline: its name among those of the recipe; empty: none is compared with.
        bound: the number.
        times: of the baseline's figure.
        plus: this much more.
    """

    key: str
    baseline: str = ""
    bound: float | None = None
    times: float = 1.0
    plus: float = 0.0

    @property
    def strictly(self) -> bool:
        """Whether the wanted figure itself is too little: that of a baseline, as it is."""
        return self.bound is None and self.times == 1.0 and self.plus == 0.0

    def wanted(self, baseline: float | None) -> float | None:
        """The figure that is wanted; None where it depends on a baseline that is not known."""
        if self.bound is not None:
            return self.bound
        return None if baseline is None else self.times * baseline + self.plus

    def met(self, ours: float, wanted: float, higher_is_better: bool) -> bool:
        """Whether our figure reaches the wanted one."""
        more = ours - wanted if higher_is_better else wanted - ours
        return more > 0 if self.strictly else more >= 0


@dataclass(frozen=True)
class TaskRecipe:
    """A row of the table.

    Args:
        task: of ``--task``.
        data: name in ``data/datasets.yaml``.
        columns: role -> column of the table.
        length: ``--epochs N`` or ``--steps N``.
        flags: all others.
        goals: figures to reach.
        baselines: by name; each computed on the same split.
        before: flags of a training of masked-lm, on the column of the role ``text``, whose weights this one
            begins with.
    """

    task: str
    data: str
    columns: Mapping[str, str]
    length: str
    flags: str
    goals: tuple[Goal, ...]
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    before: str = ""


RECIPES: dict[str, TaskRecipe] = {
    "sections": TaskRecipe(
        "classify",
        "debian-sections",
        {"text": "description", "label": "section"},
        "--epochs 5",
        "--tokenizer bpe --vocab-size 16384 --seq-len 80 --model lstm --layers 1 --width 128 --dropout 0.6 "
        "--global-batch-size 64 --micro-batch-size 32 --learning-rate 2e-3",
        (Goal("val_accuracy", LINEAR), Goal("val_macro_f1", LINEAR)),
        {LINEAR: linear},
    ),
    "sentiment": TaskRecipe(
        "classify",
        "vader-sentiment",
        {"text": "text", "label": "label"},
        "--epochs 4",
        "--tokenizer bpe --vocab-size 16384 --seq-len 48 --model lstm --layers 1 --width 128 --dropout 0.7 "
        "--global-batch-size 64 --micro-batch-size 32 --learning-rate 1.5e-3",
        (Goal("val_accuracy", LINEAR, bound=0.80),),
        {LINEAR: linear},
    ),
    "relations": TaskRecipe(
        "classify",
        "wordnet-relations",
        {"text": "text", "label": "relation"},
        "--epochs 4",
        "--tokenizer bpe --vocab-size 16384 --seq-len 64 --model lstm --layers 1 --width 128 --dropout "
        "0.6 --global-batch-size 64 --micro-batch-size 32 --learning-rate 3e-3",
        (Goal("val_macro_f1", LINEAR, bound=0.85),),
        {LINEAR: linear},
    ),
    "masked-lm": TaskRecipe(
        "classify",
        "debian-sections",
        {"text": "description", "label": "section"},
        "--epochs 8",
        "--val-fraction 0.9 --seq-len 64 --model lstm --layers 1 --width 128 --dropout 0.6 "
        "--global-batch-size 64 --micro-batch-size 32 --learning-rate 1.5e-3",
        (Goal("val_accuracy", SCRATCH), Goal("val_macro_f1", SCRATCH)),
        before="--tokenizer bpe --vocab-size 4096 --seq-len 64 --model lstm --layers 1 --width 128 "
        "--dropout 0.1 --steps 2000 --global-batch-size 64 --micro-batch-size 32 --learning-rate 3e-3",
    ),
    "translate": TaskRecipe(
        "translate",
        "debian-de",
        {"source": "en", "target": "de"},
        "--epochs 3",
        "--tokenizer bpe --vocab-size 4096 --source-len 56 --target-len 64 --layers 2 --width 128 --heads "
        "4 --dropout 0.1 --global-batch-size 64 --micro-batch-size 32 --learning-rate 2e-3",
        (Goal("val_chrf", "copied", times=2.0), Goal("val_chrf", "word table")),
        {"copied": copied, "word table": word_table},
    ),
    "summarize": TaskRecipe(
        "summarize",
        "debian-summaries",
        {"source": "description", "target": "synopsis"},
        "--epochs 3",
        "--tokenizer bpe --vocab-size 8192 --source-len 64 --target-len 16 --model lstm --layers 1 "
        "--width 128 --pointer-generator --dropout 0.1 --global-batch-size 64 --micro-batch-size 32 "
        "--learning-rate 4e-3",
        (Goal("val_rouge_l", "lead, 12 words", bound=0.35),),
        {"lead, 12 words": lead},
    ),
    "answer": TaskRecipe(
        "answer",
        "manual-pages",
        {"context": "context", "question": "question", "answer": "answer", "start": "start"},
        "--epochs 8",
        "--tokenizer bpe --vocab-size 2048 --source-len 288 --model lstm --layers 1 --width 96 --dropout 0.2 "
        "--global-batch-size 32 --micro-batch-size 16 --learning-rate 3e-3",
        (Goal("val_f1", "best sentence", plus=0.15),),
        {"best sentence": overlapping},
    ),
    "transcribe": TaskRecipe(
        "transcribe",
        "asterisk-prompts",
        {"source": "audio", "target": "text"},
        "--epochs 60",
        "--sample-rate 8000 --mels 40 --stack-frames 5 --tokenizer bpe --vocab-size 300 --source-len 120 "
        "--target-len 64 --layers 2 --width 128 --heads 4 --dropout 0.1 --global-batch-size 16 "
        "--micro-batch-size 8 --learning-rate 1e-3",
        (Goal("val_wer", "commonest", bound=0.30),),
        {"commonest": commonest("target")},
    ),
    "speak": TaskRecipe(
        "speak",
        "asterisk-prompts",
        {"source": "text", "target": "audio"},
        "--epochs 40",
        "--sample-rate 8000 --mels 40 --stack-frames 5 --tokenizer char --source-len 96 --target-len 96 "
        "--layers 2 --width 128 --heads 4 --dropout 0.1 --global-batch-size 16 --micro-batch-size 8 "
        "--learning-rate 1e-3",
        (Goal(WORDS_READ, bound=0.50),),
    ),
    "caption": TaskRecipe(
        "caption",
        "noto-emoji",
        {"source": "image", "target": "name"},
        "--epochs 30",
        "--image-size 64 --patch-size 8 --tokenizer bpe --vocab-size 1024 --source-len 64 --target-len 20 "
        "--layers 2 --width 128 --heads 4 --dropout 0.1 --global-batch-size 64 --micro-batch-size 32 "
        "--learning-rate 2e-3",
        (Goal("val_bleu", "commonest"), Goal("val_exact_match", "commonest")),
        {"commonest": commonest("target")},
    ),
}
