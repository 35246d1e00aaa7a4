"""Archives are unpacked whole or not at all, and never outside their folder."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from diffseg_nnunet.dataset_conversion.archives import (
    archives_in,
    extract,
    extracted_folder,
    is_archive,
    unpacked_bytes,
)
from diffseg_nnunet.errors import BadInputError

FILES = {"Task01/imagesTr/a.nii.gz": b"image" * 100, "Task01/dataset.json": b"{}"}


def make(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def refusal(archive: Path) -> str:
    before = sorted(archive.parent.parent.rglob("*"))
    with pytest.raises(BadInputError) as caught:
        extract(archive)
    assert sorted(archive.parent.parent.rglob("*")) == before
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz", ".tgz"])
def test_the_content_lies_beside_the_archive(folder: Path, ending: str) -> None:
    archive = make(folder / f"data{ending}", {**FILES, "__MACOSX/Task01/x": b"", "Task01/._a.nii.gz": b""})
    seen: list[tuple[int, int]] = []
    assert is_archive(archive)
    assert unpacked_bytes(archive) == 502
    assert extract(archive, lambda done, total: seen.append((done, total))) == folder / "data/Task01"
    assert {p.relative_to(folder / "data").as_posix(): p.read_bytes() for p in folder.glob("data/**/*.*")} == FILES
    assert seen == [(1, 2), (2, 2)]
    # a second time, what is there is taken
    assert extract(archive) == folder / "data/Task01"


def test_several_top_folders_stay_together(folder: Path) -> None:
    archive = make(folder / "data.zip", {"images/a.nii.gz": b"1", "labels/a.nii.gz": b"2"})
    assert extract(archive) == extracted_folder(archive) == folder / "data"


@pytest.mark.parametrize("ending", [".zip", ".tar"])
@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "..\\evil", "C:\\evil", "a/..", "\\\\server\\share\\evil"]
)
def test_members_that_lead_out_of_the_folder(folder: Path, ending: str, name: str) -> None:
    message = refusal(make(folder / f"data{ending}", {"fine": b"1", name: b"2"}))
    assert "leads out of the folder" in message
    assert "Do not trust" in message


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar(folder: Path, kind: bytes) -> None:
    with tarfile.open(folder / "data.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("first"), io.BytesIO())
        entry = tarfile.TarInfo("second")
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    assert "holds 'second', which is a " in refusal(folder / "data.tar")


def test_links_in_a_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    assert "'link', which is a link" in refusal(folder / "data.zip")


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_a_truncated_archive(folder: Path, ending: str) -> None:
    archive = make(folder / f"data{ending}", {"a": bytes(range(256)) * 50})
    archive.write_bytes(archive.read_bytes()[:-60])
    assert "cannot be unpacked" in refusal(archive)


def test_a_damaged_member_takes_all_others_with_it(folder: Path) -> None:
    archive = make(folder / "data.zip", {"a": b"x" * 100, "b": b"y" * 100})
    archive.write_bytes(archive.read_bytes().replace(b"y" * 100, b"z" * 100))
    assert "cannot be unpacked: Bad CRC-32" in refusal(archive)


def test_a_name_that_occurs_twice(folder: Path) -> None:
    with tarfile.open(folder / "data.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    assert "it holds 'a.txt' twice" in refusal(folder / "data.tar")


def test_a_file_within_a_file(folder: Path) -> None:
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("a.txt", "1")
        archive.writestr("a.txt/b.txt", "2")
    assert "it holds 'a.txt' twice" in refusal(folder / "data.zip")


def test_archives_in_a_folder(folder: Path) -> None:
    (folder / "sub/deep").mkdir(parents=True)
    for name in ("b.ZIP", "sub/a.tar.gz", "sub/c.7z", "sub/deep/d.zip", "._e.zip", "f.nii.gz"):
        (folder / name).touch()
    assert archives_in(folder) == [folder / "b.ZIP", folder / "sub/a.tar.gz", folder / "sub/c.7z"]
    assert archives_in(folder / "nowhere") == []


def test_an_empty_archive_and_no_archive(folder: Path) -> None:
    assert "holds no file" in refusal(make(folder / "data.zip", {}))
    (folder / "text.zip").write_text("no archive")
    assert "not a zip file" in refusal(folder / "text.zip")
    assert not is_archive(folder)


def test_a_folder_of_something_else_is_in_the_way(folder: Path) -> None:
    archive = make(folder / "data.zip", FILES)
    (folder / "data/Task01").mkdir(parents=True)
    assert "exists already, and is not what data.zip holds" in refusal(archive)
