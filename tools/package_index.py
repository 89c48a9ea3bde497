# SPDX-License-Identifier: Apache-2.0
"""Fetches source distributions from the package index that the user's pip is configured for.

pip itself cannot download a source distribution without building it. Indexes, find-links, proxy
and certificates are read from `pip config list`; no index is named here.
"""

import ast
import copy
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    DistributionPackage,
    NoSuchProjectError,
    ProjectPage,
    PyPISimple,
)

CHUNK = 1 << 20
ATTEMPTS = 3


class FetchError(RuntimeError):
    """A source distribution cannot be had. Its subclasses say why."""


class IndexUnreachableError(FetchError):
    """No configured index answered: an offline machine, or a broken configuration."""


class NotOnIndexError(FetchError):
    """The indexes answered, and none has this source distribution."""


class BadDownloadError(FetchError):
    """What was fetched does not have the hash that the index states."""


@dataclass(frozen=True)
class PipSettings:
    """What of pip's configuration decides where packages come from."""

    indexes: tuple[str, ...]
    find_links: tuple[str, ...] = ()
    certificates: str | None = None
    client_certificate: str | None = None
    proxy: str | None = None
    timeout_s: float = 60.0


def pip_settings(python: str = sys.executable) -> PipSettings:
    """Reads `pip config list` of the given interpreter; the environment overrides files, and
    without any index pip's own default holds. Raises subprocess.CalledProcessError."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse_pip_settings(listing)


def parse_pip_settings(listing: str) -> PipSettings:
    """The settings in the text that `pip config list` prints: lines like global.key='value',
    lowest precedence first except for the environment (":env:"), which always wins."""
    values: dict[str, str] = {}
    lines = [line for line in listing.splitlines() if "=" in line]
    for line in sorted(lines, key=lambda text: text.startswith(":env:")):
        name, _, quoted = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ("global", "download", "install", ":env:"):
            values[key] = str(ast.literal_eval(quoted))
    indexes = [] if _true(values.get("no-index")) else [values.get("index-url", "")]
    if indexes == [""]:
        indexes = [PYPI_SIMPLE_ENDPOINT]
    if indexes:
        indexes += values.get("extra-index-url", "").split()
    return PipSettings(
        indexes=tuple(indexes),
        find_links=tuple(values.get("find-links", "").split()),
        certificates=values.get("cert"),
        client_certificate=values.get("client-cert"),
        proxy=values.get("proxy"),
        timeout_s=float(values.get("default-timeout", values.get("timeout", "60"))),
    )


def fetch_sdist(
    project: str,
    version: str,
    folder: Path,
    settings: PipSettings | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """The verified source distribution of one release, from `folder` when it was fetched before.

    The hash that the index states is kept beside the file and checked at every use. Raises
    FetchError.
    """
    target = folder / f"{project}-{version}.tar.gz"
    note = folder / f"{target.name}.sha256"
    if target.is_file() and note.is_file() and sha256(target) == note.read_text().strip():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings or pip_settings()
    if (local := _linked(target.name, settings)) is not None:
        say(f"taking {target.name} from {local.parent}")
        shutil.copyfile(local, target)
        note.write_text(sha256(target))  # a folder of find-links states no hash; pip asks for none
        return target
    with _session(settings) as session:
        package = _find(project, version, settings, session)
        stated = package.digests.get("sha256")
        if stated is None:
            raise BadDownloadError(f"{package.url}: the index states no sha256 for it")
        say(f"fetching {target.name} from {urlsplit(package.url).netloc or package.url}")
        partial = target.with_suffix(f".part{os.getpid()}")
        try:
            _download(package.url, partial, session, settings.timeout_s)
            got = sha256(partial)
            if got != stated:
                raise BadDownloadError(f"{package.url}: sha256 {got}, the index states {stated}")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    note.write_text(stated)
    return target


# Python 3.11 knows what a member must not do from 3.11.4 on; index archives are checked by hash.
_SAFE: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def extract(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Unpacks the members of a source distribution whose path below its top folder is `wanted`.

    Complete or absent: the work is done beside `folder` and moved there at the end. Raises
    FetchError for a member that would lie outside of it.
    """
    work = folder.with_name(f"{folder.name}.part{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            if path and (member.isfile() or member.issym()) and wanted(path):
                if ".." in Path(path).parts:
                    raise FetchError(f"{archive}: member {member.name!r} leaves the archive")
                inside = copy.copy(member)
                inside.name = path
                tar.extract(inside, work, **_SAFE)
    shutil.rmtree(folder, ignore_errors=True)
    work.replace(folder)


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "on")


def _linked(name: str, settings: PipSettings) -> Path | None:
    for link in settings.find_links:
        folder = _local(link) or Path(link)
        if (folder / name).is_file():
            return folder / name
    return None


def _local(url: str) -> Path | None:
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _session(settings: PipSettings) -> requests.Session:
    session = requests.Session()
    if settings.certificates:
        session.verify = settings.certificates
    if settings.client_certificate:
        session.cert = settings.client_certificate
    if settings.proxy:
        session.proxies = {"http": settings.proxy, "https": settings.proxy}
    return session


def _find(
    project: str, version: str, settings: PipSettings, session: requests.Session
) -> DistributionPackage:
    failures = []
    answered = False
    for index in settings.indexes:
        try:
            page = _page(index, project, settings, session)
        except requests.RequestException as error:
            failures.append(f"{index}: {error}")
            continue
        answered = True
        for package in page.packages if page else ():
            if package.package_type == "sdist" and package.version == version:
                return package
    if not answered or failures:
        raise IndexUnreachableError(
            f"{project} {version}: no answer from " + "; ".join(failures or ["any index"])
        )
    raise NotOnIndexError(f"{project} {version}: no source distribution on {settings.indexes}")


def _page(
    index: str, project: str, settings: PipSettings, session: requests.Session
) -> ProjectPage | None:
    """The project's page of one index, None when it does not know the project."""
    folder = _local(index)
    if folder is not None:
        file = folder / project / "index.html"
        if not file.is_file():
            return None
        return ProjectPage.from_html(project, file.read_text(), base_url=file.as_uri())
    client = PyPISimple(index, session=session)
    for attempt in _attempts():
        try:
            return client.get_project_page(project, timeout=settings.timeout_s)
        except requests.ConnectionError:
            if attempt == ATTEMPTS:
                raise
        except NoSuchProjectError:
            return None
    return None


def _download(url: str, target: Path, session: requests.Session, timeout_s: float) -> None:
    local = _local(url.partition("#")[0])
    if local is not None:
        shutil.copyfile(local, target)
        return
    for attempt in _attempts():
        try:
            with session.get(url, stream=True, timeout=timeout_s) as response:
                response.raise_for_status()
                with target.open("wb") as file:
                    for chunk in response.iter_content(CHUNK):
                        file.write(chunk)
                return
        except requests.RequestException as error:
            if attempt == ATTEMPTS:
                raise IndexUnreachableError(f"{url}: {error}") from error


def _attempts() -> Iterator[int]:
    """1 to ATTEMPTS, with a growing pause between."""
    for attempt in range(1, ATTEMPTS + 1):
        yield attempt
        time.sleep(attempt)
