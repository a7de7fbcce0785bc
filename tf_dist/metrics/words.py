"""Split text into words for metrics, in any language; and SQuAD's normalization of answers.

Chinese characters and Japanese kana are words of one character each, since these languages put no spaces
between words (MLQA's evaluation does so too, Lewis et al. 2020, arXiv:1910.07475). Languages that use
neither spaces nor these characters (Thai, Khmer, Lao) are not segmented: a phrase counts as one word.
"""

from __future__ import annotations

import re
import string
import unicodedata

ASCII_WORD = re.compile(r"[a-z0-9]+")
# Han (with extensions and compatibility forms), hiragana, katakana; their marks of iteration and length.
UNSPACED = re.compile(
    "[\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
ARTICLES = frozenset({"a", "an", "the"})


def words(text: str) -> list[str]:
    """Lower-case words of letters, digits and combining marks; anything else separates words.

    Of ASCII text these are the tokens of Google's ``rouge_score`` without stemming. That package drops all
    letters that are not ASCII; here they are letters. Composed and decomposed accents are equal (NFC).
    """
    text = unicodedata.normalize("NFC", text).lower()
    if text.isascii():
        return ASCII_WORD.findall(text)
    # Categories L, N and M: the vowel signs of Devanagari are marks, and belong to their word.
    kept = (one if unicodedata.category(one)[0] in "LNM" else " " for one in text)
    return _split("".join(kept))


def answer_words(text: str) -> list[str]:
    """Words of an answer as SQuAD compares them: lower case, no punctuation, no English article.

    This is ``normalize_answer`` of SQuAD's ``evaluate-v1.1.py`` (Rajpurkar et al. 2016, arXiv:1606.05250),
    extended to other languages: all punctuation of Unicode is removed, not only that of ASCII; NFC makes
    composed and decomposed accents equal; Chinese and Japanese are compared by characters. English articles
    are removed in texts of any language, as XQuAD's evaluation does: where they are words with another
    meaning (German "an"), they are ignored on both sides.
    """
    text = unicodedata.normalize("NFC", text).lower()
    text = "".join(one for one in text if not _is_punctuation(one))
    return [word for word in _split(text) if word not in ARTICLES]


def _split(text: str) -> list[str]:
    return UNSPACED.sub(r" \g<0> ", text).split()


def _is_punctuation(character: str) -> bool:
    # `$+<=>^`|~` are symbols in Unicode and punctuation in SQuAD.
    return character in string.punctuation or unicodedata.category(character)[0] == "P"
