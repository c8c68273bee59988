"""An archive arrives whole or not at all, and brings nothing but an index."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sqlite3
import tarfile

import pytest

from rag_blockcache.errors import IndexMismatchError, OutOfSpaceError, StoreError
from rag_blockcache.index_records import DocumentRecord, IndexSettings, PassageRecord
from rag_blockcache.jobs import archive_writer
from rag_blockcache.jobs.archive import export_index, import_index
from rag_blockcache.jobs.archive_reader import read_settings
from rag_blockcache.jobs.index_lock import index_lock
from rag_blockcache.manifest import Manifest

SETTINGS = IndexSettings("tiny", "f00", "minilm", "paper", "512 tokens")


@pytest.fixture
def index(tmp_path):
    """An index as others lay it out: databases with a write-ahead log, vectors, and block files."""
    directory = tmp_path / "index"
    manifest = Manifest(directory)
    manifest.adopt(SETTINGS)
    manifest.replace_documents([DocumentRecord("d", "1", (PassageRecord("p", "b", 7),))])
    manifest.close()
    (directory / "index").mkdir()
    (directory / "blocks" / "0a").mkdir(parents=True)
    (directory / "index" / "vectors.faiss").write_bytes(os.urandom(5000))
    for number in range(5):
        (directory / "blocks" / "0a" / f"{number}.safetensors").write_bytes(os.urandom(70_000))
    connection = sqlite3.connect(directory / "blocks" / "cache.db")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE entries (name TEXT)")
    connection.execute("INSERT INTO entries VALUES ('committed')")
    connection.commit()
    yield directory
    connection.close()


def files(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix not in (".lock", ".sqlite", ".db", ".db-wal", ".db-shm")
    }


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_an_index_arrives_as_it_was(index, tmp_path, name):
    exported = export_index(index, tmp_path / name)
    imported = import_index(tmp_path / name, tmp_path / "new", fingerprint="f00")
    assert files(tmp_path / "new") == files(index)
    assert exported.settings == imported.settings == SETTINGS
    assert (imported.num_files, imported.num_bytes) == (exported.num_files, exported.num_bytes)
    assert imported.num_files == 8
    assert Manifest(tmp_path / "new").passages_of("d") == ["p"]
    connection = sqlite3.connect(tmp_path / "new" / "blocks" / "cache.db")
    assert connection.execute("SELECT name FROM entries").fetchall() == [("committed",)]  # out of the log
    connection.close()


def test_an_uncommitted_change_stays_at_home(index, tmp_path):
    connection = sqlite3.connect(index / "blocks" / "cache.db")
    connection.execute("INSERT INTO entries VALUES ('unfinished')")
    export_index(index, tmp_path / "a.tar")
    connection.rollback()
    connection.close()
    import_index(tmp_path / "a.tar", tmp_path / "new")
    connection = sqlite3.connect(tmp_path / "new" / "blocks" / "cache.db")
    assert connection.execute("SELECT name FROM entries").fetchall() == [("committed",)]
    connection.close()


def test_many_files_are_checked_in_groups(index, tmp_path, monkeypatch):
    monkeypatch.setattr(archive_writer, "_FILES_PER_CHECK", 3)
    export_index(index, tmp_path / "a.tar")
    import_index(tmp_path / "a.tar", tmp_path / "new")
    assert files(tmp_path / "new") == files(index)


def test_progress_is_told_after_each_file(index, tmp_path):
    told = []
    export_index(index, tmp_path / "a.tar", progress=told.append)
    import_index(tmp_path / "a.tar", tmp_path / "new", progress=told.append)
    assert [(one.stage, one.num_done, one.num_total) for one in told] == [
        *(("export", number, 8) for number in range(1, 9)),
        *(("import", number, None) for number in range(1, 9)),
    ]


def test_an_index_of_another_model_is_refused_before_anything_is_written(index, tmp_path):
    export_index(index, tmp_path / "a.tar")
    with pytest.raises(IndexMismatchError, match=r"tiny.*f00.*bar"):
        import_index(tmp_path / "a.tar", tmp_path / "new", fingerprint="bar")
    assert not (tmp_path / "new").exists()


def test_a_directory_in_use_is_never_imported_into(index, tmp_path):
    export_index(index, tmp_path / "a.tar")
    before = files(index)
    with pytest.raises(StoreError, match="is not an empty directory"):
        import_index(tmp_path / "a.tar", index)
    assert files(index) == before
    (tmp_path / "empty").mkdir()
    import_index(tmp_path / "a.tar", tmp_path / "empty")


def test_an_archive_is_never_written_over(index, tmp_path):
    (tmp_path / "a.tar").write_text("precious")
    with pytest.raises(StoreError, match="exists already"):
        export_index(index, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_text() == "precious"


def test_a_directory_without_index_cannot_be_exported(tmp_path):
    with pytest.raises(StoreError, match="holds no index"):
        export_index(tmp_path, tmp_path / "a.tar")


def test_an_index_is_not_exported_while_a_job_writes_it(index, tmp_path):
    with index_lock(index, exclusive=False), pytest.raises(StoreError, match="another job is at work"):
        export_index(index, tmp_path / "a.tar")
    assert not list(tmp_path.glob("*a.tar*"))


def leftovers(tmp_path):
    return [path.name for path in tmp_path.iterdir() if path.name not in ("index", "a.tar")]


def test_a_damaged_byte_is_found_and_named(index, tmp_path):
    export_index(index, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        offset = tar.getmember("blocks/0a/3.safetensors").offset_data
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[offset + 100] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(StoreError, match=r"blocks/0a/3\.safetensors in .* is damaged"):
        import_index(tmp_path / "a.tar", tmp_path / "new")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.97])
def test_an_archive_cut_short_is_refused_and_leaves_nothing(index, tmp_path, name, share):
    export_index(index, tmp_path / "a.tar")
    if name == "a.tar.gz":
        export_index(index, tmp_path / name)
        os.rename(tmp_path / name, tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(StoreError):
        import_index(tmp_path / "a.tar", tmp_path / "new")
    assert leftovers(tmp_path) == []


def test_an_archive_that_lost_its_last_files_is_refused(index, tmp_path):
    export_index(index, tmp_path / "a.tar")
    rewrite(tmp_path / "a.tar", lambda members: members[:-1])
    with pytest.raises(StoreError, match="ends too early"):
        import_index(tmp_path / "a.tar", tmp_path / "new")


def rewrite(path, change):
    """Write an archive again with other members: a list of (TarInfo, content)."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(path, "w") as tar:
        for member, content in change(members):
            tar.addfile(member, io.BytesIO(content))


def planted(name, **attributes):
    member = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    if member.isreg():
        member.size = 4
    return member, b"evil"


@pytest.mark.parametrize(
    "member",
    [
        planted("../escaped"),
        planted("blocks/../../escaped"),
        planted("/tmp/escaped"),
        planted("blocks\\..\\escaped"),
        planted("elsewhere/escaped"),
        planted("blocks/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        planted("blocks/link", type=tarfile.LNKTYPE, linkname="manifest.sqlite"),
        planted("blocks/device", type=tarfile.CHRTYPE),
        planted("blocks/pipe", type=tarfile.FIFOTYPE),
        planted("blocks", type=tarfile.DIRTYPE),
        planted("archive.json"),
    ],
    ids=lambda planting: f"{planting[0].name}-{planting[0].type.decode()}",
)
def test_nothing_but_plain_files_of_an_index_is_unpacked(index, tmp_path, member):
    export_index(index, tmp_path / "a.tar")
    rewrite(tmp_path / "a.tar", lambda members: [members[0], member, *members[1:]])
    with pytest.raises(StoreError, match="not a file of an index"):
        import_index(tmp_path / "a.tar", tmp_path / "new")
    assert leftovers(tmp_path) == []


def test_a_file_that_is_not_listed_is_refused(index, tmp_path):
    export_index(index, tmp_path / "a.tar")
    rewrite(tmp_path / "a.tar", lambda members: [members[0], planted("blocks/extra"), *members[1:]])
    with pytest.raises(StoreError, match="does not hold the files that it lists"):
        import_index(tmp_path / "a.tar", tmp_path / "new")


def test_a_file_that_comes_twice_is_refused(index, tmp_path):
    export_index(index, tmp_path / "a.tar")
    rewrite(tmp_path / "a.tar", lambda members: [*members[:2], members[1], *members[2:]])
    with pytest.raises(StoreError, match="twice"):
        import_index(tmp_path / "a.tar", tmp_path / "new")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"format": "something else"}, "not an archive of an index"),
        ({"format": "rag_blockcache index", "version": 99}, "format version 99"),
        ({"format": "rag_blockcache index", "version": 1}, "cannot be read"),
        ([], "not an archive of an index"),
    ],
)
def test_a_foreign_or_newer_archive_is_refused(tmp_path, description, message):
    member = tarfile.TarInfo("archive.json")
    content = json.dumps(description).encode()
    member.size = len(content)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(StoreError, match=message):
        import_index(tmp_path / "a.tar", tmp_path / "new")


def test_a_file_that_is_no_archive_and_one_that_is_missing_are_told_apart(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(StoreError, match="damaged or no archive"):
        import_index(tmp_path / "a.tar", tmp_path / "new")
    with pytest.raises(StoreError, match="check the path"):
        import_index(tmp_path / "missing.tar", tmp_path / "new")


@pytest.mark.parametrize(("recorded", "meant"), [(True, "preamble"), (False, "themselves")])
def test_an_archive_from_before_stand_ins_is_read(recorded, meant, index, tmp_path):
    export_index(index, tmp_path / "a.tar")

    def age(members):
        described = json.loads(members[0][1])
        del described["settings"]["blocks_see"]
        described["settings"]["condition_on_preamble"] = recorded
        content = json.dumps(described).encode()
        members[0][0].size = len(content)
        return [(members[0][0], content), *members[1:]]

    rewrite(tmp_path / "a.tar", age)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert read_settings(tar, tmp_path / "a.tar").blocks_see == meant


def test_a_description_of_another_index_is_refused(index, tmp_path):
    export_index(index, tmp_path / "a.tar")

    def lie(members):
        content = members[0][1].replace(b"f00", b"bar")
        return [(members[0][0], content), *members[1:]]

    rewrite(tmp_path / "a.tar", lie)
    with pytest.raises(StoreError, match="describes another index"):
        import_index(tmp_path / "a.tar", tmp_path / "new", fingerprint="bar")
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_no_archive(index, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_writer, "add_file", fail)
    with pytest.raises(OutOfSpaceError, match="free some"):
        export_index(index, tmp_path / "a.tar")
    assert leftovers(tmp_path) == []


def _import_and_die(archive, target):
    import_index(archive, target, progress=lambda done: os.kill(os.getpid(), signal.SIGKILL))


def test_a_killed_import_leaves_no_index_and_the_next_one_clears_up(index, tmp_path):
    export_index(index, tmp_path / "a.tar")
    worker = multiprocessing.get_context("fork").Process(
        target=_import_and_die, args=(tmp_path / "a.tar", tmp_path / "new")
    )
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    assert len(leftovers(tmp_path)) == 1
    import_index(tmp_path / "a.tar", tmp_path / "new")
    assert leftovers(tmp_path) == ["new"]
