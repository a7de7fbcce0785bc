"""What a table is made from: packages of Debian and PyPI, pinned by version and SHA-256."""

from __future__ import annotations

from typing import Annotated

import msgspec

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Url = Annotated[str, msgspec.Meta(pattern=r"^https?://[!-~]+\Z")]


class AptIndex(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An index of a suite: ``Packages`` or ``Translation-LANGUAGE``; SHA-256 of its text."""

    name: Annotated[str, msgspec.Meta(pattern=r"^(Packages|Translation-[A-Za-z_]+)\Z")]
    sha256: Sha256


class AptPackage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A package of a suite, and the SHA-256 of its .deb."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9+.-]+\Z")]
    version: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+:~-]*\Z")]
    sha256: Sha256


class AptSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Indices and packages of one suite of Debian's, component main.

    ``mirrors`` have it; none: those that apt is set up with on this machine.
    """

    suite: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z-]*\Z")]
    indices: tuple[AptIndex, ...] = ()
    packages: tuple[AptPackage, ...] = ()
    mirrors: tuple[Url, ...] = ()


class PipPackage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A distribution on PyPI: ``file`` is its name there; an sdist (.tar.gz), or a wheel."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
    version: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+!]*\Z")]
    file: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*\.(tar\.gz|whl)\Z")]
    sha256: Sha256


class TableSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a table of the registry is made.

    ``recipe`` is a name in `tf_dist.corpora.recipes.RECIPES`; ``columns`` map roles to columns of the table;
    ``rows`` is how many it has, None where that depends on this machine.
    """

    recipe: str
    columns: dict[str, str]
    rows: int | None = None
    apt: AptSource | None = None
    pip: tuple[PipPackage, ...] = ()
