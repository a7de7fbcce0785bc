"""Packages are unpacked inside one folder, or refused; nothing in them becomes a link."""

import io
import shutil
import stat
import subprocess
import tarfile
import zipfile

import pytest

from tf_dist.data import unpacking
from tf_dist.data.unpacking import unpack
from tf_dist.errors import DataError


def tar(path, members):
    """A tar of (name, bytes), or of (name, a link to what)."""
    with tarfile.open(path, "w:gz") as made:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                made.addfile(info)
            else:
                info.size = len(data)
                made.addfile(info, io.BytesIO(data))
    return path


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as made:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            if isinstance(data, str):
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            made.writestr(info, data)
    return path


MAKERS = {"a.tar.gz": tar, "a.whl": wheel}


@pytest.fixture(params=MAKERS)
def make(request, tmp_path):
    return lambda members: MAKERS[request.param](tmp_path / request.param, members)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def test_regular_files_alone_and_only_wanted_ones(make, folder):
    archive = make([("a/x.po", b"x"), ("a/b/y.po", b"y"), ("z.py", b"z"), ("a/l.po", "/etc/passwd")])
    assert unpack(archive, folder, ["*.po"]) == 2
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == {"a", "a/x.po", "a/b", "a/b/y.po"}
    assert (folder / "a/b/y.po").read_bytes() == b"y"


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out"])
def test_names_that_lead_out_are_refused(make, folder, name):
    with pytest.raises(DataError, match="leads out of its folder"):
        unpack(make([(name, b"x")]), folder)
    assert not (folder.parent / "out").exists()


def test_a_file_behind_a_link_or_twice_is_refused(make, folder, tmp_path):
    unpack(make([("a", str(tmp_path)), ("a/new", b"x")]), folder)
    assert (folder / "a/new").read_bytes() == b"x"
    assert not (tmp_path / "new").exists()


def test_the_same_name_twice(folder, tmp_path):
    with pytest.raises(DataError, match="File exists"):
        unpack(tar(tmp_path / "a.tar.gz", [("a", b"x"), ("a", b"y")]), folder)


def test_limits(make, folder, monkeypatch):
    archive = make([("a", bytes(3000)), ("b", bytes(3000))])
    monkeypatch.setattr(unpacking, "BYTES_LIMIT", 5999)
    with pytest.raises(DataError, match="holds more than 5,999 bytes"):
        unpack(archive, folder)
    monkeypatch.setattr(unpacking, "BYTES_LIMIT", 6000)
    monkeypatch.setattr(unpacking, "FILES_LIMIT", 1)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(DataError, match="or 1 files"):
        unpack(archive, folder)


@pytest.mark.parametrize("name", [*MAKERS, "a.deb", "a.rpm"])
def test_damaged_or_unknown(tmp_path, folder, name):
    if name == "a.deb" and not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb here")
    (tmp_path / name).write_bytes(b"hello" * 100)
    with pytest.raises(DataError, match=f"{name}( is of an unknown kind|:)"):
        unpack(tmp_path / name, folder)


def deb(path, files):
    """A package of Debian's with some files and a link."""
    root = path.with_suffix("")
    (root / "DEBIAN").mkdir(parents=True)
    control = "Package: small\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n"
    (root / "DEBIAN/control").write_text(control)
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "link").symlink_to("/etc/passwd")
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, path], check=True, capture_output=True)
    return path


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb here")
def test_deb(tmp_path, folder):
    archive = deb(tmp_path / "small.deb", {"usr/share/a": b"x" * 100_000, "usr/b": b"y"})
    assert unpack(archive, folder, ["*/a"]) == 1
    assert (folder / "usr/share/a").stat().st_size == 100_000
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot unpack"):
        unpack(archive, folder / "new")


def test_deb_without_dpkg(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(unpacking.shutil, "which", lambda _: None)
    with pytest.raises(DataError, match="needs dpkg-deb"):
        unpack(tmp_path / "a.deb", folder)
