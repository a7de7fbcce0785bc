import hashlib
import http.server
import io
import threading
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from tf_dist.data import download
from tf_dist.data.registry import fetch, read_registry, resolve_sources
from tf_dist.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
TEXT = b"a small corpus\n" * 100


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.strip("/")
        if name == "hang":
            self.server.released.wait(20)
            return
        data = self.server.pages.get(name)
        if isinstance(data, str):
            self.send_response(302)
            self.send_header("Location", data)
            self.end_headers()
            return
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) + (100 if name == "truncated" else 0)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.asked, running.pages, running.released = [], {}, threading.Event()
        running.pages["text"] = running.pages["truncated"] = TEXT
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def get(server, tmp_path):
    """Fetch from a registry of one entry, as given by its fields."""

    def run(*pages, timeout_s=5.0, **fields):
        port = server.server_address[1]
        urls = [f"http://127.0.0.1:{port}/{page}" for page in pages]
        registry = tmp_path / "datasets.yaml"
        registry.write_text(yaml.safe_dump({"small": {"files": {"train": {"urls": urls, **fields}}}}))
        return fetch("small", registry, tmp_path / "downloads", timeout_s=timeout_s)

    return run


def left_over(tmp_path):
    return sorted(path.name for path in (tmp_path / "downloads").rglob("*") if path.is_file())


def test_downloaded_verified_and_reused(server, get, tmp_path):
    path = get("text", size_bytes=len(TEXT), sha256=sha256(TEXT))
    assert path == tmp_path / "downloads" / "small" / "train.txt"
    assert path.read_bytes() == TEXT
    assert get("text", size_bytes=len(TEXT), sha256=sha256(TEXT)) == path
    assert server.asked == ["/text"]
    assert left_over(tmp_path) == ["train.txt"]
    path.write_bytes(b"damaged")
    assert get("text", size_bytes=len(TEXT), sha256=sha256(TEXT)).read_bytes() == TEXT


def test_first_sha256_is_kept_and_holds(server, get, tmp_path):
    path = get("text")
    note = path.with_name("train.txt.sha256")
    assert note.read_text().strip() == sha256(TEXT)
    path.unlink()
    server.pages["text"] = TEXT + b"another"
    with pytest.raises(DataError, match=r"should be .* delete it if the text was renewed"):
        get("text")
    assert not path.exists()
    note.unlink()
    assert get("text").read_bytes() == TEXT + b"another"


@pytest.mark.parametrize(
    ("page", "fields", "message"),
    [
        ("text", {"sha256": "0" * 64}, "its SHA-256 is"),
        ("text", {"size_bytes": len(TEXT) - 1}, "larger than 1,499 bytes"),
        ("text", {"size_bytes": len(TEXT) + 1}, "it has 1,500 bytes, and should have 1,501"),
        ("truncated", {}, "1,?500|IncompleteRead|more expected"),
        ("none", {}, "HTTP Error 404"),
    ],
)
def test_wrong_downloads(get, tmp_path, page, fields, message):
    with pytest.raises(DataError, match=message) as caught:
        get(page, **fields)
    said = str(caught.value)
    assert f"/{page}" in said
    assert f"put it at {tmp_path / 'downloads' / 'small' / 'train.txt'}, or use --data FILE" in said
    assert caught.value.exit_code == 65
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://127.0.0.1:1/x", "data:text/plain,hello", "gopher://127.0.0.1/x", "/to"],
)
def test_redirections_lead_to_no_other_kind_of_address(server, get, tmp_path, target):
    server.pages["to"] = target
    with pytest.raises(DataError, match="could not download"):
        get("to")
    assert left_over(tmp_path) == []


def test_redirections_are_followed(server, get):
    server.pages["to"] = "/text"
    assert get("to").read_bytes() == TEXT


def test_a_server_that_sends_next_to_nothing(get, tmp_path, monkeypatch):
    """Each byte in time, and yet never done."""
    monkeypatch.setattr(download, "PATIENCE_S", 0.0)
    monkeypatch.setattr(download, "SLOWEST_BYTES_PER_S", 1e12)
    with pytest.raises(DataError, match="which is too slow"):
        get("text")
    assert left_over(tmp_path) == []


def test_hanging_server(get):
    started = time.monotonic()
    with pytest.raises(DataError, match="timed out"):
        get("hang", timeout_s=0.3)
    assert time.monotonic() - started < 10


def test_no_server(tmp_path):
    registry = tmp_path / "r.yaml"
    registry.write_text("small: {files: {train: {urls: ['http://127.0.0.1:1/x']}}}")
    with pytest.raises(DataError, match=r"could not download http://127\.0\.0\.1:1/x"):
        fetch("small", registry, tmp_path)


def test_second_address(server, get):
    assert get("none", "text").read_bytes() == TEXT
    assert server.asked == ["/none", "/text"]


def test_put_there_by_hand(server, get, tmp_path):
    path = tmp_path / "downloads" / "small" / "train.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(TEXT)
    assert get("none", size_bytes=len(TEXT)) == path
    assert get("none", member="x", size_bytes=5, text_size_bytes=len(TEXT)) == path
    assert server.asked == []


def test_unzips_the_member_only(server, get, tmp_path):
    server.pages["all.zip"] = zipped({"wiki/train": TEXT, "wiki/test": b"no", "../evil": b"out"})
    path = get("all.zip", member="wiki/train", sha256=sha256(server.pages["all.zip"]))
    assert path.read_bytes() == TEXT
    assert left_over(tmp_path) == ["archive-all.zip", "train.txt", "train.txt.sha256"]
    path.write_bytes(b"damaged")
    assert get("all.zip", member="wiki/train").read_bytes() == TEXT
    assert server.asked == ["/all.zip"]


def test_member_that_climbs_out_lands_inside(server, get, tmp_path):
    server.pages["all.zip"] = zipped({"../../evil": TEXT})
    assert get("all.zip", member="../../evil") == tmp_path / "downloads" / "small" / "train.txt"
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        (zipped({"other": TEXT}), {}, "has no member train"),
        (b"not a zip", {}, "cannot unpack"),
        (zipped({"train": TEXT}), {"text_size_bytes": 10}, "larger than 10 bytes"),
        (zipped({"train": TEXT}), {"text_sha256": "0" * 64}, "its SHA-256 is"),
    ],
)
def test_wrong_archives(server, get, data, fields, message):
    server.pages["all.zip"] = data
    with pytest.raises(DataError, match=message):
        get("all.zip", member="train", **fields)


def test_a_bomb_is_stopped(server, get, monkeypatch):
    monkeypatch.setattr(download, "LIMIT_BYTES", 1 << 21)
    server.pages["all.zip"] = zipped({"train": bytes(1 << 23)})
    with pytest.raises(DataError, match="larger than 2,097,152 bytes"):
        get("all.zip", member="train")


def test_names_become_paths(server, get, tmp_path):
    path = get("text")
    registry = tmp_path / "datasets.yaml"
    own = tmp_path / "own.txt"
    own.write_text("x")
    values = ["small", str(own), "stdlib", "*.txt", "small/train"]
    resolved = resolve_sources(values, registry, tmp_path / "downloads")
    assert resolved == (str(path), str(own), "stdlib", "*.txt", str(path))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("smal", "Did you mean small?"),
        ("stdlb", "Did you mean stdlib?"),
        ("nothing/like/it.txt", "no such file or folder: nothing/like/it.txt"),
        ("small/tset", "small has no part 'tset'. It has: train"),
    ],
)
def test_unknown_names(get, tmp_path, value, message):
    get("text")
    with pytest.raises(DataError) as caught:
        resolve_sources([value], tmp_path / "datasets.yaml", tmp_path)
    assert message in str(caught.value)


def test_no_registry(tmp_path):
    with pytest.raises(DataError, match="no such file or folder: small"):
        resolve_sources(["small"], tmp_path / "none.yaml", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "a: [",
        "[]",
        "a: 1",
        "a: {files: {test: {urls: ['http://x/y']}}}",
        "a: {files: {train: {urls: []}}}",
        "a: {files: {train: {urls: ['file:///etc/passwd']}}}",
        "a: {files: {train: {urls: ['http://x/y'], sha256: xyz}}}",
        "a: {files: {train: {urls: ['http://x/y'], size_bytes: big}}}",
        "a: {files: {train: {urls: ['http://x/y'], unknown: 1}}}",
        "../a: {files: {train: {urls: ['http://x/y']}}}",
        "a: {files: {train: {urls: ['http://x/y']}, ../b: {urls: ['http://x/y']}}}",
        "a: {files: {train: {urls: ['http://x/y'], size_bytes: true}}}",
        "a: {files: {train: {urls: ['http://x/y'], text_size_bytes: -1}}}",
        "a: {files: {train: {urls: [['http://x/y']]}}}",
        'a: {files: {train: {urls: ["http://x/\\r\\nX: y"]}}}',
        "!!python/object/apply:os.system ['true']",
    ],
)
def test_registry_is_checked(tmp_path, content):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(DataError, match=r"r\.yaml"):
        read_registry(tmp_path / "r.yaml")


def test_our_registry():
    datasets = read_registry(ROOT / "data" / "datasets.yaml")
    texts = {name for name, dataset in datasets.items() if dataset.table is None}
    assert texts == {"tinyshakespeare", "wikitext-2", "wikitext-103", "ptb", "text8", "enwik8"}
    assert all(dataset.licence for dataset in datasets.values())
    assert datasets["enwik8"].files["train"].text_size_bytes == 100_000_000
    assert datasets["wikitext-2"].files["validation"].member == "wikitext-2-raw/wiki.valid.raw"
