"""`make docs`: pages, reference and examples become a site without a network, and links are checked."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Loaded with a page; a link that a reader may follow is something else.
LOADED = re.compile(r"""<(?:script|img|link(?![^>]*rel="canonical"))\b[^>]*(?:src|href)="(https?://[^"]*)""")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="MkDocs is not installed: `make docs` installs it",
)


def built(folder, site):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_site(tmp_path):
    done = built(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "index.html",
        "guide.html",
        "contributing.html",
        "decisions/0001-own-loop.html",
        "data.html",
    ):
        assert (tmp_path / name).is_file(), name
    reference = (tmp_path / "reference.html").read_text()
    for name in ("launch.connect", "Trainer.fit", "api.distribute", "base.Comm.allreduce", "SyncCheck"):
        assert re.search(rf'id="[\w.]*{re.escape(name)}"', reference), name
    assert "def build(config)" in re.sub("<[^>]*>", "", (tmp_path / "examples" / "index.html").read_text())
    for page in tmp_path.rglob("*.html"):
        assert not LOADED.findall(page.read_text()), page


@pytest.mark.parametrize(
    ("line", "said"),
    [("[x](guide.md#no-such-heading)", "no-such-heading"), ("[x](../scripts/no_such.py)", "no_such.py")],
)
def test_a_link_that_leads_nowhere_stops_it(tmp_path, line, said):
    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in ("docs", "build") and not entry.name.startswith("."):
            (copy / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "docs", copy / "docs")
    with open(copy / "docs" / "guide.md", "a") as page:
        page.write(f"\n{line}\n")
    done = built(copy, tmp_path / "site")
    assert done.returncode != 0 and said in done.stdout + done.stderr, done.stdout + done.stderr
