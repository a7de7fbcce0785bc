"""What `make docs` does to the pages before MkDocs reads them; MkDocs calls these functions.

Pages at the top of the repository become pages of the site. Links to files of the repository that are no
pages become plain text, after a look whether there is such a file: a link that leads nowhere stops the build.
"""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Pages that do not lie in docs/, and what they are called on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "data/README.md": "data.md",
}
EXAMPLES = "examples/README.md"
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(docs/([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```|^(?: {4}|\t).*?$)", re.MULTILINE | re.DOTALL)


def on_config(config):
    """Add the records of decisions, in their order."""
    records = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    config["nav"].append({"Decisions": [f"decisions/{path.name}" for path in records]})
    return config


def on_files(files, config):
    """Add the pages that lie elsewhere."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to pages of the site; show the examples below their list."""
    of_page = {page: source for source, page in ELSEWHERE.items()}
    uri = page.file.src_uri
    source = of_page.get(uri, f"docs/{uri}")
    markdown = IMAGE.sub(r"![\1](\2)", markdown)
    parts = CODE.split(markdown)  # every second one is code
    parts[::2] = [LINK.sub(lambda found: _link(found, source, uri), part) for part in parts[::2]]
    markdown = "".join(parts)
    if uri == EXAMPLES:
        for path in sorted((ROOT / "docs" / "examples").glob("*.py")):
            markdown += f"\n## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
    return markdown


def _link(found, source, uri):
    """A link of a source file as one of the site's page."""
    text, (path, hash_, anchor) = found[1], found[2].partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return found[0]
    target = Path(os.path.normpath((ROOT / source).parent / path))
    if not target.is_relative_to(ROOT) or not target.exists():
        raise PluginError(f"{source}: a link to {path}, which is not there")
    name = target.relative_to(ROOT).as_posix()
    page = ELSEWHERE.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
    if page is None or target.is_dir():
        return text
    up = "../" * uri.count("/")
    return f"[{text}]({up}{page}{hash_}{anchor})"
