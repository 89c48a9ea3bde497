# SPDX-License-Identifier: Apache-2.0
"""Source distributions from an index, without a network: pip's configuration and a folder index."""

import hashlib
import io
import tarfile

import pytest

package_index = pytest.importorskip("tools.package_index", reason="needs pypi-simple")


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture
def index(tmp_path):
    """A file:// index with one release of one project, and the settings that name it."""
    page = tmp_path / "simple" / "thing"
    page.mkdir(parents=True)
    sdist = page / "thing-1.0.tar.gz"
    archive(sdist, {"thing-1.0/thing/a.py": "x = 1\n", "thing-1.0/tests/b.txt": "b\n"})
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    (page / "index.html").write_text(f'<a href="{sdist.name}#sha256={digest}">{sdist.name}</a>')
    return package_index.PipSettings(indexes=((tmp_path / "simple").as_uri(),))


def quiet(_line):
    """Takes the progress lines."""


def test_the_environment_overrides_the_files():
    found = package_index.parse_pip_settings(
        ":env:.index-url='https://env/simple'\n"
        "global.index-url='https://file/simple'\n"
        "global.extra-index-url='file:///a\\nfile:///b'\n"
        "global.proxy='http://proxy:1'\n"
        "global.cert='/cert.pem'\n"
        "freeze.timeout='1'\n"
    )
    assert found.indexes == ("https://env/simple", "file:///a", "file:///b")
    assert (found.proxy, found.certificates, found.timeout_s) == ("http://proxy:1", "/cert.pem", 60)


def test_without_an_index_pips_default_holds_and_no_index_means_none():
    assert package_index.parse_pip_settings("").indexes == (package_index.PYPI_SIMPLE_ENDPOINT,)
    without = package_index.parse_pip_settings("global.no-index='true'\nglobal.find-links='/w'\n")
    assert (without.indexes, without.find_links) == ((), ("/w",))


def test_fetch_verifies_and_keeps(tmp_path, index):
    folder = tmp_path / "cache"
    path = package_index.fetch_sdist("thing", "1.0", folder, index, quiet)
    assert path == folder / "thing-1.0.tar.gz"
    nowhere = package_index.PipSettings(indexes=())
    assert package_index.fetch_sdist("thing", "1.0", folder, nowhere, quiet) == path
    path.write_bytes(b"damaged")
    assert (
        package_index.fetch_sdist("thing", "1.0", folder, index, quiet).read_bytes() != b"damaged"
    )


def test_a_wrong_hash_is_refused_and_nothing_is_kept(tmp_path, index):
    sdist = tmp_path / "simple" / "thing" / "thing-1.0.tar.gz"
    sdist.write_bytes(sdist.read_bytes() + b"x")
    with pytest.raises(package_index.BadDownloadError, match="the index states"):
        package_index.fetch_sdist("thing", "1.0", tmp_path / "cache", index, quiet)
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_release_and_a_missing_index_are_different_errors(tmp_path, index):
    with pytest.raises(package_index.NotOnIndexError, match=r"thing 2\.0"):
        package_index.fetch_sdist("thing", "2.0", tmp_path / "cache", index, quiet)
    with pytest.raises(package_index.NotOnIndexError, match="other"):
        package_index.fetch_sdist("other", "1.0", tmp_path / "cache", index, quiet)
    with pytest.raises(package_index.IndexUnreachableError, match="no answer"):
        package_index.fetch_sdist(
            "thing", "1.0", tmp_path / "cache", package_index.PipSettings(indexes=()), quiet
        )


def test_find_links_come_first(tmp_path, index):
    links = tmp_path / "wheels"
    links.mkdir()
    archive(links / "thing-1.0.tar.gz", {"thing-1.0/own.py": ""})
    settings = package_index.PipSettings(index.indexes, find_links=(str(links),))
    path = package_index.fetch_sdist("thing", "1.0", tmp_path / "cache", settings, quiet)
    assert path.read_bytes() == (links / "thing-1.0.tar.gz").read_bytes()


def test_extract_takes_what_is_wanted_without_the_top_folder(tmp_path, index):
    path = package_index.fetch_sdist("thing", "1.0", tmp_path / "cache", index, quiet)
    package_index.extract(path, tmp_path / "out", lambda name: name.startswith("thing/"))
    assert [
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.py")
    ] == ["thing/a.py"]
    assert not (tmp_path / "out" / "tests").exists()


@pytest.mark.parametrize("safe", [True, False], ids=["filter", "no filter"])
def test_a_member_outside_of_the_archive_is_refused(tmp_path, monkeypatch, safe):
    """Also by a Python 3.11 that is older than tarfile's filters."""
    if not safe:
        monkeypatch.setattr(package_index, "_SAFE", {})
    archive = tmp_path / "thing.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("thing-1.0/thing/../../../out.py")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"bad\n"))
    with pytest.raises(package_index.FetchError, match=r"thing/\.\./.* leaves the archive"):
        package_index.extract(archive, tmp_path / "a" / "b", lambda name: True)
    assert not list(tmp_path.rglob("out.py"))
