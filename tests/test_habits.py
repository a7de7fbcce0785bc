"""What surrounds the code stays true: pre-commit, versions, the pages that say how to contribute."""

import configparser
import re
from pathlib import Path

import yaml

from tf_dist.version import __version__

ROOT = Path(__file__).parents[1]
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def recipe(target):
    """The commands of a target of the Makefile."""
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [line.strip().replace("$(PY)", ".venv/bin/python") for line in rule[1].splitlines()]


def test_pre_commit_runs_what_make_lint_runs_and_downloads_nothing():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [one["repo"] for one in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert [hook["entry"] for hook in hooks] == recipe("lint")
    assert {hook["language"] for hook in hooks} == {"system"}
    assert not any(hook["pass_filenames"] for hook in hooks)


def test_one_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    newest = re.search(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == __version__


def test_changes_are_told_by_kind():
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert newest.count("\n### ") and set(re.findall(r"^### (.+)$", newest, re.MULTILINE)) <= KINDS


def test_what_contributors_are_told_to_run_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:|^{target.rpartition('-')[0]}-%:", makefile, re.MULTILINE), target
    for what in ("strategy", "transport", "model"):
        steps = text.split(f"## Add a {what}\n")[1].split("\n## ")[0]
        assert len(re.findall(r"^\d\. ", steps, re.MULTILINE)) == 5, what
    for path in re.findall(r"`((?:tf_dist|tests)/[\w/.]+\.py)`", text):
        assert (ROOT / path).is_file(), path


def test_extras_that_targets_install_are_there():
    setup = configparser.ConfigParser(inline_comment_prefixes=None)
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    assert "mkdocs-material" in extras["docs"] and "mkdocstrings" in extras["docs"]
    assert "pre-commit" in extras["dev"]
