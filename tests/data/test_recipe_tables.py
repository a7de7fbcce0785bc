"""Packages by apt-get and pip -> tables, by a registry; the clients are made here, nothing is downloaded."""

import hashlib
import json
import sys
import zipfile

import pytest
import yaml

from tf_dist.corpora.recipes import RECIPES
from tf_dist.corpora.table_rows import MediaFile, TableRecipe
from tf_dist.data import package_clients, recipe_tables
from tf_dist.data.package_sources import AptSource
from tf_dist.data.records import read_records
from tf_dist.data.registry import fetch, read_registry, resolve_sources
from tf_dist.errors import DataError

INDEX = b"Package: a\nDescription-md5: aa\nDescription-en: hello\n Hello\n there.\n"
PACKAGE = b"a package"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


APT_GET = """#!{python}
# Stands for apt-get: it notes how it was called, and writes what a mirror would have given.
import os, pathlib, sys
if sys.argv[1] == "indextargets":
    print("\\n".join(["http://own/debian"] * 3 if pathlib.Path({mirrors!r}).exists() else []))
    sys.exit()
configuration = pathlib.Path(os.environ["APT_CONFIG"]).read_text()
state = pathlib.Path(configuration.split('Dir::State "')[1].split('"')[0])
source = (state / "sources.list").read_text()
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "|" + source)
if "broken" in source:
    sys.exit("E: Could not resolve 'broken'")
if sys.argv[-1] == "update":
    (state / "lists/m_dists_bookworm_main_binary-amd64_Packages").write_text("Package: small\\n")
    (state / "lists/m_dists_bookworm_main_i18n_Translation-en").write_bytes({index!r})
else:
    name = sys.argv[-1].replace("=", "_").replace(":", "%3a") + "_all.deb"
    pathlib.Path(name).write_bytes({package!r})
"""


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Commands that were given to apt-get."""
    log, program = tmp_path / "log", tmp_path / "bin/apt-get"
    program.parent.mkdir()
    mirrors = tmp_path / "mirrors"
    mirrors.touch()
    values = {"log": str(log), "index": INDEX, "package": PACKAGE, "mirrors": str(mirrors)}
    program.write_text(APT_GET.format(python=sys.executable, **values))
    program.chmod(0o755)
    (tmp_path / "bin/apt-config").write_text("#!/bin/sh\necho 'Acquire::http::Proxy \"http://proxy\";'\n")
    (tmp_path / "bin/apt-config").chmod(0o755)
    (tmp_path / "keys").touch()
    monkeypatch.setattr(package_clients, "KEYRING", tmp_path / "keys")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return lambda: [line.split("|")[0] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def get(tmp_path):
    """A table of a registry of one entry."""

    def run(recipe="debian-summaries", **fields):
        table = {"recipe": recipe, "columns": {"source": "description", "target": "synopsis"}, **fields}
        registry = tmp_path / "datasets.yaml"
        registry.write_text(yaml.safe_dump({"small": {"licence": "free", "table": table}}))
        return fetch("small", registry, tmp_path / "downloads")

    return run


def indices(data=INDEX, **more):
    return {"suite": "bookworm", "indices": [{"name": "Translation-en", "sha256": sha256(data)}], **more}


def test_an_index_becomes_a_table_once(tmp_path, apt, get):
    path = get(apt=indices(), rows=1)
    assert path == tmp_path / "downloads/small/train.jsonl"
    assert json.loads(path.read_text()) == {"description": "Hello there.", "synopsis": "hello"}
    columns = read_registry(tmp_path / "datasets.yaml")["small"].table.columns
    (record,) = read_records([str(path)], columns)
    assert record.values == {"source": "Hello there.", "target": "hello"}
    assert get(apt=indices(), rows=1) == path
    assert apt() == ["-q update"]
    configuration = (tmp_path / "downloads/apt/state-bookworm/apt.conf").read_text()
    assert 'Acquire::http::Proxy "http://proxy";' in configuration
    assert 'Dir::Etc::parts "/dev/null";' in configuration
    assert 'Acquire::Languages "en";' in configuration
    assert resolve_sources(["small"], tmp_path / "datasets.yaml", tmp_path / "downloads") == (str(path),)
    assert not [one for one in (tmp_path / "downloads").rglob(".tmp-*")]


def test_a_table_is_made_again_when_its_package_or_recipe_changes(tmp_path, monkeypatch, apt, get):
    path = get(apt=indices())
    path.write_text("changed")
    get(apt=indices())
    assert path.read_text() == "changed"
    old = RECIPES["debian-summaries"]
    monkeypatch.setitem(RECIPES, "debian-summaries", TableRecipe(old.rows, version=2))
    get(apt=indices())
    assert "Hello there." in path.read_text()
    # Put there by hand: nothing is known of it.
    (path.parent / recipe_tables.NOTE).unlink()
    path.write_text("by hand")
    get(apt=indices())
    assert path.read_text() == "by hand"


def test_another_mirror_is_tried(apt, get):
    mirrors = ["http://broken/debian", "http://mirror/debian"]
    assert get(apt=indices(mirrors=mirrors)).is_file()
    assert apt() == ["-q update", "-q update"]


def test_mirrors_are_those_of_this_machine(tmp_path, apt, get):
    get(apt=indices())
    assert "http://own/debian" in (tmp_path / "log").read_text()
    (tmp_path / "downloads/apt/bookworm-Translation-en").unlink()
    (tmp_path / "downloads/small/train.jsonl").unlink()
    (tmp_path / "mirrors").unlink()
    assert "apt knows no mirror" in refused(get, apt=indices())


def refused(get, **fields):
    with pytest.raises(DataError) as caught:
        get(**fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_network(tmp_path, apt, get):
    message = refused(get, apt=indices(mirrors=["http://broken/debian"]))
    assert (
        "could not get index Translation-en of Debian bookworm: http://broken/debian: apt-get: E: Could not"
        in message
    )
    assert f"put it at {tmp_path}/downloads/apt/bookworm-Translation-en" in message
    assert not (tmp_path / "downloads/small/train.jsonl").exists()
    (tmp_path / "downloads/apt/bookworm-Translation-en").write_bytes(INDEX)
    assert get(apt=indices(mirrors=["http://broken/debian"])).is_file()


def test_another_sha256(tmp_path, apt, get):
    message = refused(get, apt=indices(b"other"))
    assert sha256(INDEX) in message and sha256(b"other") in message
    assert not (tmp_path / "downloads/apt/bookworm-Translation-en").exists()


def test_no_apt_and_no_keys(tmp_path, monkeypatch, apt, get):
    (tmp_path / "keys").unlink()
    assert "apt-get install debian-archive-keyring" in refused(get, apt=indices())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "it needs apt-get, of Debian or Ubuntu" in refused(get, apt=indices())


def test_packages_of_debian(tmp_path, apt):
    fields = [{"name": "small", "version": "1:2-3", "sha256": sha256(PACKAGE)}]
    import msgspec

    source = msgspec.convert({"suite": "bookworm", "packages": fields}, AptSource)
    for _ in range(2):
        (path,) = package_clients.fetch_deb_files(source, tmp_path / "apt")
        assert path == tmp_path / "apt/small_1%3a2-3.deb"
        assert path.read_bytes() == PACKAGE
    assert apt() == ["-q update", "-q download small=1:2-3"]


@pytest.mark.parametrize(
    "table",
    [
        {"recipe": "debian-summaries"},
        {"recipe": "x", "columns": {}, "more": 1},
        {"recipe": "x", "columns": {}, "apt": {"suite": "../x"}},
        {"recipe": "x", "columns": {}, "apt": {"suite": "x", "packages": [{"name": "-o", "version": "1"}]}},
        {
            "recipe": "x",
            "columns": {},
            "pip": [{"name": "a", "version": "1", "file": "../a.whl", "sha256": "0" * 64}],
        },
        {
            "recipe": "x",
            "columns": {},
            "pip": [{"name": "--x", "version": "1", "file": "a.whl", "sha256": "0" * 64}],
        },
    ],
)
def test_entries_that_cannot_be(tmp_path, table):
    (tmp_path / "datasets.yaml").write_text(yaml.safe_dump({"small": {"table": table}}))
    with pytest.raises(DataError, match="small, table: "):
        read_registry(tmp_path / "datasets.yaml")


def test_unknown_recipe_or_part_or_another_number_of_rows(tmp_path, apt, get):
    assert "no recipe 'none'. There are: debian-sections" in refused(get, recipe="none")
    assert "came out with 1 rows, and should have 2" in refused(get, apt=indices(), rows=2)
    assert not (tmp_path / "downloads/small/train.jsonl").exists()
    with pytest.raises(DataError, match=r"small has no part 'test'\. It has: train"):
        fetch("small/test", tmp_path / "datasets.yaml", tmp_path)


def test_files_beside_the_table(tmp_path, monkeypatch, get):
    found = [{"audio": MediaFile("wav/a.wav", b"sound"), "text": "a"}]
    monkeypatch.setitem(RECIPES, "sounds", TableRecipe(lambda _: iter(found)))
    path = get(recipe="sounds")
    assert json.loads(path.read_text()) == {"audio": "wav/a.wav", "text": "a"}
    assert (path.parent / "wav/a.wav").read_bytes() == b"sound"
    monkeypatch.setitem(
        RECIPES, "out", TableRecipe(lambda _: iter([{"audio": MediaFile("../../a.wav", b"")}]))
    )
    assert "leads out of" in refused(get, recipe="out")


def test_a_distribution_by_pip_from_a_folder(tmp_path, monkeypatch, get):
    pytest.importorskip("pip")
    wheel = tmp_path / "wheels/small_messages-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "small_messages-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("small/locale/de/LC_MESSAGES/django.po", 'msgid "Yes"\nmsgstr "Ja"\n')
        made.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-messages\nVersion: 1.0\n")
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    package = {"name": "small-messages", "version": "1.0", "file": wheel.name}
    pytest.importorskip("polib")
    message = refused(get, recipe="django-de", pip=[{**package, "sha256": "0" * 64}])
    assert "could not get small-messages==1.0 of PyPI: pip: ERROR: " in message
    path = get(recipe="django-de", pip=[{**package, "sha256": sha256(wheel.read_bytes())}])
    assert json.loads(path.read_text()) == {"en": "Yes", "de": "Ja"}


def test_the_registry_that_is_shipped_names_recipes_and_columns():
    from tf_dist.data.registry import REGISTRY

    tables = {name: one.table for name, one in read_registry(REGISTRY).items() if one.table is not None}
    assert tables.keys() == RECIPES.keys()
    for name, table in tables.items():
        assert table.recipe == name and table.columns
