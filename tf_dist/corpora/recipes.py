"""Recipes by name, for `recipe` in ``data/datasets.yaml``."""

from __future__ import annotations

from functools import partial

from tf_dist.corpora import (
    asterisk_prompts,
    debian_descriptions,
    django_messages,
    manual_pages,
    noto_emoji,
    stdlib_docstrings,
    vader_sentiment,
    wordnet_relations,
)
from tf_dist.corpora.table_rows import TableRecipe

RECIPES = {
    "debian-sections": TableRecipe(debian_descriptions.sections),
    "debian-summaries": TableRecipe(debian_descriptions.summaries),
    "debian-de": TableRecipe(partial(debian_descriptions.translations, language="de")),
    "debian-fr": TableRecipe(partial(debian_descriptions.translations, language="fr")),
    "vader-sentiment": TableRecipe(
        vader_sentiment.rows, ("*/hutto_ICWSM_2014.tar.gz", "*_GroundTruth.txt"), nested="*.tar.gz"
    ),
    "wordnet-relations": TableRecipe(
        wordnet_relations.rows, tuple(f"*/{name}" for name in wordnet_relations.FILES.values())
    ),
    "manual-pages": TableRecipe(manual_pages.rows, ("*/man1/*.1.gz",)),
    "asterisk-prompts": TableRecipe(asterisk_prompts.rows, ("*.wav", "*/core-sounds-*.txt.gz")),
    "noto-emoji": TableRecipe(noto_emoji.rows, ("*/NotoColorEmoji.ttf", "*/emoji-test.txt")),
    "django-de": TableRecipe(partial(django_messages.rows, language="de"), ("*/locale/de/LC_MESSAGES/*.po",)),
    "stdlib-docstrings": TableRecipe(stdlib_docstrings.rows),
}
