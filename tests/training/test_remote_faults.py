"""What else happens to work directories in cloud storage: other things there, losses, bad places.

No run: files are made and removed by hand, as a run does.
"""

import shutil
import uuid

import numpy as np
import pytest

import fedasr.cli.compare as cli_compare
from fedasr.data.corpus import InMemoryCorpus
from fedasr.data.preparation.prepare import prepare
from fedasr.data.writing import write_corpus
from fedasr.errors import UserError
from fedasr.federated.local import LocalStore
from fedasr.fields import bucket
from fedasr.training import locks, loop
from fedasr.training.checkpoint import Checkpointer
from fedasr.training.remote import copies, mirror, owner, storage
from fedasr.training.remote.copies import STEP_MARKER, local
from fedasr.training.remote.storage import Storage


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No waiting; copies in a folder of this test."""
    monkeypatch.setenv("FEDASR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(owner, "_SETTLED", 0.0)
    monkeypatch.setattr(storage, "_WAITS", ())
    copies._read.clear()


@pytest.fixture
def url():
    return f"memory://{uuid.uuid4().hex}/run"


def names(url):
    return sorted(Storage(url).sizes())


def fill(url, *files):
    for name in files:
        Storage(url).write(name, name.encode())


def make(folder, *files, content="x"):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def step(number, folder="checkpoints"):
    return [f"{folder}/{number}/{name}" for name in (STEP_MARKER, "state/a", "metadata/b")]


def test_what_lies_beside_a_run_is_not_its_own(url):
    others = ["3/config.json", *(f"3/{name}" for name in step(7)), "4/data.bin", "notes.txt"]
    fill(url, *others, "checkpoints/2/state/a", "checkpoints/2/state/b.part")
    with mirror.mirrored(url) as copy:
        assert {path.name for path in copy.folder.iterdir()} == {"notes.txt"}
        make(copy.folder, *step(1))
    assert names(url) == sorted([*others, *step(1)])


@pytest.mark.parametrize("place", ["s3://", "gs:///", "memory://", "file:///"])
def test_a_url_of_no_bucket_makes_no_folder_of_that_name(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="names no bucket"):
        with mirror.mirrored(place):
            pass
    with pytest.raises(UserError, match="names no bucket"):
        local(place)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])


def test_chained_urls_are_no_folders():
    assert "is not on a file system" in bucket("simplecache::s3://bucket/run")
    assert bucket("a:b/c") is None and bucket("a::b") is None and bucket("x/gs://b") is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: prepare([], "gs://bucket/x", name="x"),
        lambda: write_corpus(
            "gs://bucket/x", {"train": InMemoryCorpus({"a": [{"x": np.zeros(1)}]})}
        ),
        lambda: LocalStore("gs://bucket/x", None, 1),
        lambda: Checkpointer("gs://bucket/x"),
        lambda: cli_compare.run(["gs://bucket/a", "gs://bucket/b"]),
    ],
)
def test_what_writes_on_disks_alone_makes_no_folder_of_a_url(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not on a file system"):
        make()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["//run", "/a/./run", "/a/..", "/.", "/../run"])
def test_urls_whose_files_would_not_be_found_again_are_refused(end):
    with pytest.raises(UserError, match="an empty part, or one of dots"):
        with mirror.mirrored(f"memory://bucket{end}"):
            pass
    assert Storage("file:///tmp/x/").url == "file:///tmp/x"


def test_what_is_written_and_not_listed_is_not_done(url, monkeypatch):
    monkeypatch.setattr(mirror, "say", lambda text: None)
    monkeypatch.setattr(Storage, "sizes", lambda self: {})
    with pytest.raises(UserError, match=r"does not list config\.json, which was written"):
        with mirror.mirrored(url) as copy:
            make(copy.folder, "config.json")


@pytest.mark.parametrize("end", ["...", ".hidden", "x" * 300, " [1]*é%20#?", ""])
def test_copies_of_whatever_name_lie_by_themselves(url, end):
    other = mirror.copies_folder() / "another" / "run"
    other.mkdir(parents=True)
    place = mirror.place_of(f"{url}/{end}")
    assert place.parent.parent == mirror.copies_folder()
    assert place.name == place.resolve().name
    with mirror.mirrored(f"{url}/{end}"):
        assert other.is_dir() and place.is_dir()
    assert other.is_dir() and not place.parent.exists()


def test_a_place_for_copies_that_cannot_be_is_one_line(url, tmp_path, monkeypatch):
    fill(url, *step(1))
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDASR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot be copied to .* give FEDASR_CACHE a folder"):
        with mirror.mirrored(url):
            pass
    assert names(url) == sorted(step(1))
    with pytest.raises(UserError, match=r"cannot be copied to .* give FEDASR_CACHE a folder"):
        local(url)


def test_a_name_that_is_a_file_and_a_folder_is_one_line(tmp_path):
    # As in a bucket: an object, and others that begin with its name and a slash.
    class Both(Storage):
        def sizes(self):
            return {"local": 1, "local/rows.f32": 1}

        def download(self, names, folder):
            make(folder, *names)

    with pytest.raises(UserError, match="cannot be copied to"):
        copies.copied(Both("memory://both"), tmp_path)


@pytest.mark.parametrize("lost", ["checkpoints", "best", "local"])
def test_what_the_copy_has_lost_stays_in_the_bucket(url, lost):
    all_of_it = [*step(1), *step(1, "best"), "local/rows.f32", "local/slots.i64"]
    with mirror.mirrored(url) as copy:
        make(copy.folder, *all_of_it)
    with pytest.raises(UserError, match=f"has lost {lost}"):
        with mirror.mirrored(url) as copy:
            shutil.rmtree(copy.folder / lost)
            make(copy.folder, *([] if lost == "checkpoints" else step(2)))
    assert names(url) == sorted(all_of_it)


def test_a_run_that_begins_anew_may_remove_what_the_one_before_left(url):
    fill(url, *step(9, "best"), "local/rows.f32")
    with mirror.mirrored(url) as copy:
        shutil.rmtree(copy.folder / "best")
        shutil.rmtree(copy.folder / "local")
        make(copy.folder, *step(1))
    assert names(url) == sorted(step(1))


def test_a_best_state_on_its_way_out_here_does_not_lose_its_files_there_first(url, monkeypatch):
    with mirror.mirrored(url) as copy:
        make(copy.folder, *step(1), *step(1, "best"))
        copy.push()
        (copy.folder / "best" / "1" / "state" / "a").unlink()
        there, turns = names(url), []

        def later(seconds):
            assert names(url) == there
            turns.append(seconds)
            make(copy.folder, *step(2, "best"))
            shutil.rmtree(copy.folder / "best" / "1")

        monkeypatch.setattr(mirror.time, "sleep", later)
        copy.push()
        assert len(turns) == 1 and set(step(2, "best")) <= set(names(url))


def test_what_others_removed_there_is_sent_again(url):
    with mirror.mirrored(url) as copy:
        make(copy.folder, *step(1), "config.json", "local/rows.f32")
        copy.push()
        Storage(url).remove(["config.json", "checkpoints/1/state/a"])
        Storage(url).write("local/rows.f32", b"cut")
    assert names(url) == sorted([*step(1), "config.json", "local/rows.f32"])
    assert Storage(url).read("local/rows.f32") == b"x"


def test_one_that_is_taken_over_while_it_sends_completes_no_checkpoint(url, monkeypatch):
    upload = Storage.upload

    def taken(self, sent, folder):
        upload(self, sent, folder)
        self.write(locks.OWNER_FILE, b'{"name": "another"}')

    monkeypatch.setattr(mirror, "say", lambda text: None)
    with pytest.raises(UserError, match="was taken over by another process"):
        with mirror.mirrored(url) as copy:
            make(copy.folder, *step(1))
            with monkeypatch.context() as patch:
                patch.setattr(Storage, "upload", taken)
                copy.push()
    assert f"checkpoints/1/{STEP_MARKER}" not in names(url)


def test_one_failure_is_enough(url, tmp_path, monkeypatch):
    make(tmp_path, *(f"files/{i}" for i in range(100)))
    tried = []

    def fails(self, path, name):
        tried.append(name)
        raise OSError("unreachable")

    monkeypatch.setattr(Storage, "_put_file", fails)
    with pytest.raises(UserError, match="unreachable"):
        Storage(url).upload([f"files/{i}" for i in range(100)], tmp_path)
    assert len(tried) < 60


def test_a_file_that_grows_is_sent_as_it_was_once(url, tmp_path, monkeypatch):
    make(tmp_path / "run", "log")
    put, sent = Storage._put_file, []

    def grows(self, path, name):
        put(self, path, name)
        with (tmp_path / "run" / "log").open("a") as file:
            file.write("more")
        sent.append(path)

    monkeypatch.setattr(Storage, "_put_file", grows)
    Storage(url).upload(["log"], tmp_path / "run")
    assert len(sent) == 2 and Storage(url).read("log") == b"xmore"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []

    def garbled(self, path, name):
        grows(self, path, name)
        self._put(name, b"other")

    monkeypatch.setattr(Storage, "_put_file", garbled)
    with pytest.raises(UserError, match="is not what was written"):
        Storage(url).upload(["log"], tmp_path / "run")


def test_on_a_file_system_a_file_is_replaced_at_once(tmp_path, monkeypatch):
    place = Storage(f"file://{tmp_path}/there [1] é%20")
    make(tmp_path / "here", "local/rows.f32", content="old")
    place.upload(["local/rows.f32"], tmp_path / "here")

    def dies(*args):
        raise KeyboardInterrupt

    make(tmp_path / "here", "local/rows.f32", content="new")
    with monkeypatch.context() as patch:
        patch.setattr(type(place._fs), "mv", dies)
        with pytest.raises(KeyboardInterrupt):
            place._put_file(tmp_path / "here" / "local" / "rows.f32", "local/rows.f32")
    assert place.read("local/rows.f32") == b"old"
    assert copies.leftovers(place.sizes()) == ["local/rows.f32.part"]
    assert copies.whole(place.sizes()) == ["local/rows.f32"]


def test_a_copy_is_read_anew_once_it_is_another(url):
    fill(url, "config.json")
    first = local(url)
    copies.refresh()
    assert local(url) == first
    Storage(url).write("config.json", b"CONFIG.JSON")  # of the same length
    assert local(f"{url}/") == first  # one evaluation sees one state
    copies.refresh()
    assert (local(url) / "config.json").read_bytes() == b"CONFIG.JSON"
    Storage(url).remove(["config.json"])
    copies.refresh()
    assert list(local(url).iterdir()) == []


def test_other_processes_do_not_begin_with_a_checkpoint_that_is_damaged(url, monkeypatch):
    with mirror.mirrored(url) as copy:
        with Checkpointer(copy.folder / "checkpoints") as saved:
            for number in (1, 2):
                saved.save(number, {"params": np.arange(3.0)}, {"number": number})
                saved.wait()
    marker, cut = f"checkpoints/2/{STEP_MARKER}", "checkpoints/2/metadata/metadata"
    assert {marker, cut} <= set(names(url))
    Storage(url).write(cut, b"{")
    seen = []
    monkeypatch.setattr(mirror.jax, "process_count", lambda: 2)
    monkeypatch.setattr(mirror.hosts, "wait_for_all", lambda name: seen.append(names(url)))
    monkeypatch.setattr(loop, "say", seen.append)
    with mirror.mirrored(url, loop._set_aside):
        pass
    assert "set aside as damaged-2" in seen[0]
    assert marker not in seen[1] and f"checkpoints/1/{STEP_MARKER}" in seen[1]


def test_storage_elsewhere_of_the_same_name_does_not_lose_its_copy(url):
    with mirror.mirrored(url) as copy, locks.lock_directory(copy.folder):
        Storage(url).remove([locks.OWNER_FILE])  # as where nobody has it
        with pytest.raises(UserError, match="in use by another process"):
            with mirror.mirrored(url):
                pass
        assert copy.folder.is_dir()
        fill(url, "x")
        copy._owner._write(0)
