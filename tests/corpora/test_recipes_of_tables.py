"""Recipes read what packages hold: small samples in the formats of the real ones."""

import gzip
import tarfile

import pytest

from tf_dist.corpora import roff, stdlib_docstrings
from tf_dist.corpora.debian_descriptions import Description, parsed, stanzas
from tf_dist.corpora.recipes import RECIPES
from tf_dist.corpora.table_rows import MediaFile
from tf_dist.data.unpacking import unpack
from tf_dist.errors import DataError


def rows(name, folder):
    return list(RECIPES[name].rows(folder))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


PACKAGES = """Package: cat
Description: short of it
Description-md5: aa
Section: utils

Package: dog
Description-md5: bb
Section: non-free/games

Package: cat-doc
Description-md5: aa
Section: doc
"""
ENGLISH = """Package: cat
Description-md5: aa
Description-en: shows files
 It shows files,
 one after another.
 .
 Colours:
  * red
  * blue

Package: dog
Description-md5: bb
Description-en: plays games
 It plays.

Package: cow
Description-md5: cc
Description-en: eats grass
"""
GERMAN = """Package: cat
Description-md5: aa
Description-de: zeigt Dateien
 Es zeigt Dateien.
 .
 Farben:
  * rot
  * blau

Package: dog
Description-md5: bb
Description-de: spielt
 Es spielt.
 .
 Wirklich.

Package: cow
Description-md5: cc
Description-de: eats grass

Package: hen
Description-md5: dd
Description-de: nirgends
"""


@pytest.fixture
def descriptions(tmp_path):
    write(tmp_path / "Packages", PACKAGES)
    write(tmp_path / "Translation-en", ENGLISH)
    write(tmp_path / "Translation-de", GERMAN)
    return tmp_path


COLOURS = "Colours:\n* red\n* blue"


def test_sections(descriptions):
    assert rows("debian-sections", descriptions) == [
        {
            "description": f"shows files\n\nIt shows files, one after another.\n\n{COLOURS}",
            "section": "utils",
        },
        {"description": "plays games\n\nIt plays.", "section": "games"},
    ]


def test_summaries_are_of_descriptions_with_a_text(descriptions):
    assert rows("debian-summaries", descriptions) == [
        {"description": f"It shows files, one after another.\n\n{COLOURS}", "synopsis": "shows files"},
        {"description": "It plays.", "synopsis": "plays games"},
    ]


def test_translations_are_paired_by_paragraph_where_there_are_as_many(descriptions):
    assert rows("debian-de", descriptions) == [
        {"en": "shows files", "de": "zeigt Dateien"},
        {"en": "It shows files, one after another.", "de": "Es zeigt Dateien."},
        {"en": COLOURS, "de": "Farben:\n* rot\n* blau"},
        {"en": "plays games", "de": "spielt"},
    ]


def test_fields_of_control_files(tmp_path):
    write(tmp_path / "x", "A: b: c\nB:\n d\n .\n\n\nC: e")
    assert list(stanzas(tmp_path / "x")) == [{"A": "b: c", "B": "\n d\n ."}, {"C": "e"}]
    assert parsed("title") == Description("title", ())


@pytest.fixture
def ratings(tmp_path):
    inner = tmp_path / "inner"
    names = ["amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets"]
    for number, name in enumerate(names):
        write(
            inner / f"{name}_GroundTruth.txt",
            f"1\t{1.5 - number}\tgood &amp; bad {number}\n2\t0.4\tso so\n".encode() + b"3\t-2\tcaf\xe9",
        )
        write(inner / f"{name}_anonDataRatings.txt", "not read")
    with tarfile.open(tmp_path / "hutto_ICWSM_2014.tar.gz", "w:gz") as tar:
        tar.add(inner, "hutto_ICWSM_2014")
    with tarfile.open(tmp_path / "vader.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "hutto_ICWSM_2014.tar.gz", "vader-1/additional_resources/hutto_ICWSM_2014.tar.gz")
        tar.add(tmp_path / "vader.tar.gz", "vader-1/setup.py")
    return tmp_path / "vader.tar.gz"


def test_sentiment_out_of_an_archive_in_an_archive(tmp_path, ratings):
    recipe, folder = RECIPES["vader-sentiment"], tmp_path / "unpacked"
    folder.mkdir()
    assert unpack(ratings, folder, recipe.wanted, recipe.nested) == 5
    found = rows("vader-sentiment", folder)
    assert found[0] == {"text": "good & bad 0", "label": "positive", "rating": 1.5, "domain": "reviews"}
    assert found[1] == {"text": "café", "label": "negative", "rating": -2.0, "domain": "reviews"}
    assert [row["label"] for row in found[2:]] == ["positive", "negative"] + ["negative"] * 3 + ["negative"]
    next(folder.rglob("tweets_GroundTruth.txt")).write_text("1\tx\ty")
    with pytest.raises(DataError, match="line 1 of tweets_GroundTruth"):
        rows("vader-sentiment", folder)


NOUNS = (
    "  1 the licence\n"
    "00000001 03 n 02 animal 0 beast 0 001 ~ 00000002 n 0000 | a living thing  \n"
    "00000002 03 n 01 hunting_dog 0 002 @ 00000001 n 0000 + 00000003 v 0101 | "
    'an Animal that is used to hunt; "animals of his"  \n'
)
VERBS = "00000003 03 v 01 hunt 0 001 + 00000002 n 0101 01 + 08 00 | chase an animal  \n"
ADJECTIVES = "00000004 00 s 01 canine(a) 0 001 \\ 00000001 n 0101 | of an animal  \n"


def test_relations_between_words_of_glosses(tmp_path):
    write(tmp_path / "usr/data.noun", NOUNS)
    write(tmp_path / "usr/data.verb", VERBS)
    write(tmp_path / "usr/data.adj", ADJECTIVES)
    write(tmp_path / "usr/data.adv", "")
    gloss = '<head> hunting dog </head> : an {} that is used to {}; "animals of his"'
    found = rows("wordnet-relations", tmp_path)
    assert found == [
        {
            "text": gloss.format("<tail> Animal </tail>", "hunt"),
            "head": "hunting dog",
            "tail": "Animal",
            "relation": "hypernym",
        },
        {
            "text": gloss.format("Animal", "<tail> hunt </tail>"),
            "head": "hunting dog",
            "tail": "hunt",
            "relation": "derivation",
        },
        {
            "text": "<head> canine </head> : of an <tail> animal </tail>",
            "head": "canine",
            "tail": "animal",
            "relation": "pertains_to",
        },
    ]
    write(tmp_path / "usr/data.adv", "hello\n")
    with pytest.raises(DataError, match=r"line 1 of data.adv .* is no synset"):
        rows("wordnet-relations", tmp_path)


DOCBOOK = r"""'\" t
.TH "GIT\-ADD" "1"
.SH "OPTIONS"
.PP
\-n, \-\-dry\-run
.RS 4
Don\(cqt actually add the \fIfile\fR(s)\&. Just
.B show
them\&.
.sp
More words\&.
.RE
.PP
<pathspec>\&...
.RS 4
Files\&.
.RE
.PP
\-\-chmod=(+|\-)x
.RS 4
Override the executable bit\&.
.RE
"""
HELP2MAN = r""".SH DESCRIPTION
.TP
\fB\-A\fR, \fB\-\-show\-all\fR
equivalent to \fB\-vET\fR
.TP
\fB\-u\fR
(ignored)
.PP
With no FILE.
"""


def test_options_of_manual_pages():
    dry_run, chmod = roff.options(DOCBOOK)
    assert dry_run.names == "-n, --dry-run"
    assert dry_run.paragraphs == ("Don't actually add the file(s). Just show them.", "More words.")
    assert chmod == ("--chmod=(+|-)x", ("Override the executable bit.",))
    assert roff.options(HELP2MAN) == [("-A, --show-all", ("equivalent to -vET",)), ("-u", ("(ignored)",))]


def test_questions_about_manual_pages(tmp_path):
    write(tmp_path / "usr/share/man/man1/git-add.1.gz", gzip.compress(DOCBOOK.encode()))
    write(tmp_path / "usr/share/man/man1/cat.1.gz", gzip.compress(HELP2MAN.encode()))
    found = rows("manual-pages", tmp_path)
    assert [(row["question"], row["answer"]) for row in found] == [
        ("What does --show-all do in cat?", "equivalent to -vET"),
        ("What does -u do in cat?", "(ignored)"),
        ("What does --dry-run do in git-add?", "Don't actually add the file(s)."),
        ("What does --chmod=(+|-)x do in git-add?", "Override the executable bit."),
    ]
    for row in found:
        assert row["context"][row["start"] :].startswith(row["answer"])
    assert found[2]["context"].startswith(
        "-n, --dry-run: Don't actually add the file(s). Just show them. More words.\n"
    )
    write(tmp_path / "usr/share/man/man1/cat.1.gz", b"\x1f\x8bdamaged")
    with pytest.raises(DataError, match=r"cat\.1\.gz of the package is damaged"):
        rows("manual-pages", tmp_path)


def test_prompts(tmp_path):
    transcript = (
        "; a comment: no\n\nhello: Hello,  you.\nbeep: [a tone]\ndigits/1: one\nlost: no file\n../up: out\n"
    )
    write(tmp_path / "usr/doc/core-sounds-en.txt.gz", gzip.compress(transcript.encode()))
    for name in ("hello", "digits/1", "beep", "../up"):
        write(tmp_path / f"usr/sounds/en_US/{name}.wav", name)
    assert rows("asterisk-prompts", tmp_path) == [
        {"audio": MediaFile("wav/hello.wav", b"hello"), "text": "Hello, you."},
        {"audio": MediaFile("wav/digits-1.wav", b"digits/1"), "text": "one"},
    ]


EMOJI = """# group: Smileys
1F600          ; fully-qualified     # \U0001f600 E1.0 grinning face
263A FE0F      ; fully-qualified     # \u263a\ufe0f E0.6 smiling face
263A           ; unqualified         # \u263a E0.6 smiling face
1F600 200D 263A FE0F ; fully-qualified # x E4.0 two faces
1F602          ; fully-qualified     # y E0.6 no picture
"""


def test_pictures_out_of_a_font(tmp_path):
    pytest.importorskip("fontTools")
    write(tmp_path / "usr/NotoColorEmoji.ttf", colour_font())
    write(tmp_path / "usr/emoji-test.txt", EMOJI)
    assert rows("noto-emoji", tmp_path) == [
        {"image": MediaFile("png/1f600.png", b"PNG grin"), "name": "grinning face"},
        {"image": MediaFile("png/263a-fe0f.png", b"PNG smile"), "name": "smiling face"},
        {"image": MediaFile("png/1f600-200d-263a-fe0f.png", b"PNG two"), "name": "two faces"},
    ]
    write(tmp_path / "usr/NotoColorEmoji.ttf", b"no font")
    with pytest.raises(DataError, match="is no font with pictures"):
        rows("noto-emoji", tmp_path)


METRICS = """ascender descender widthMax caretSlopeNumerator caretSlopeDenominator caretOffset minOriginSB
minAdvanceSB maxBeforeBL minAfterBL pad1 pad2""".split()


def colour_font():
    """A font with three pictures, one of which stands for a sequence."""
    import io

    from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
    from fontTools.fontBuilder import FontBuilder
    from fontTools.ttLib import newTable
    from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
    from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
    from fontTools.ttLib.tables.E_B_L_C_ import SbitLineMetrics, Strike, eblc_index_sub_table_1

    names = [".notdef", "grin", "smile", "joiner", "two", "bare"]
    builder = FontBuilder(128, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({0x1F600: "grin", 0x263A: "smile", 0x200D: "joiner", 0x1F602: "bare"})
    builder.setupGlyf({name: empty_glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (136, 0)))
    builder.setupHorizontalHeader(ascent=128, descent=0)
    builder.setupPost()
    addOpenTypeFeaturesFromString(builder.font, "feature ccmp { sub grin joiner smile by two; } ccmp;")
    pictures = {}
    for name in ("grin", "smile", "two"):
        glyph = pictures[name] = cbdt_bitmap_format_17(b"", builder.font)
        glyph.metrics, glyph.imageData = SmallGlyphMetrics(), f"PNG {name}".encode()
        glyph.metrics.height = glyph.metrics.width = glyph.metrics.Advance = 1
        glyph.metrics.BearingX = glyph.metrics.BearingY = 0
    strike, table = Strike(), eblc_index_sub_table_1(b"", builder.font)
    table.indexFormat, table.imageFormat, table.names = 1, 17, list(pictures)
    size = strike.bitmapSizeTable
    size.hori, size.vert = SbitLineMetrics(), SbitLineMetrics()
    for metrics in (size.hori, size.vert):
        for field in METRICS:
            setattr(metrics, field, 0)
    size.colorRef, size.ppemX, size.ppemY, size.bitDepth, size.flags = 0, 109, 109, 32, 1
    strike.indexSubTables = [table]
    builder.font["CBDT"], builder.font["CBLC"] = newTable("CBDT"), newTable("CBLC")
    builder.font["CBDT"].version = builder.font["CBLC"].version = 3.0
    builder.font["CBDT"].strikeData, builder.font["CBLC"].strikes = [pictures], [strike]
    buffer = io.BytesIO()
    builder.font.save(buffer)
    return buffer.getvalue()


def empty_glyph():
    from fontTools.ttLib.tables._g_l_y_f import Glyph

    return Glyph()


def test_messages_of_a_user_interface(tmp_path):
    pytest.importorskip("polib")
    entries = 'msgid "Yes"\nmsgstr "Ja"\n\nmsgctxt "x"\nmsgid "Yes"\nmsgstr "Ja"\n\nmsgid "No"\nmsgstr ""\n'
    write(tmp_path / "django/conf/locale/de/LC_MESSAGES/django.po", entries)
    write(tmp_path / "django/conf/locale/fr/LC_MESSAGES/django.po", entries)
    assert rows("django-de", tmp_path) == [{"en": "Yes", "de": "Ja"}]


DOCSTRINGS = '''"""Module."""
class A:
    """Sum
    up.

    Body.
    """
def f():
    """Do it.

    Long
      words.
    """
async def g():
    """Do it.

    Long
      words.
    """
'''


def test_docstrings(tmp_path, monkeypatch):
    write(tmp_path / "a.py", DOCSTRINGS)
    write(tmp_path / "broken.py", "def (")
    (tmp_path / "linked.py").symlink_to(tmp_path / "a.py")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "none.py")
    write(tmp_path / "site-packages/b.py", '"""Not.\n\nThis."""')
    monkeypatch.setattr(stdlib_docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert rows("stdlib-docstrings", tmp_path) == [{"body": "Long\n  words.", "summary": "Do it."}]


def test_a_package_without_the_file_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"has 0 files \*\*/data.noun"):
        rows("wordnet-relations", tmp_path)
