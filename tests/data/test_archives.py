import contextlib
import gc
import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from dsnet_jax.data import archives
from dsnet_jax.data.archives import open_source
from dsnet_jax.data.files import FolderSource
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import open_split
from dsnet_jax.errors import InputError

PNG = cv2.imencode(".png", np.arange(48, dtype=np.uint8).reshape(6, 8) // 5)[1].tobytes()
FILES = {"train/0.png": PNG, "train/1.png": PNG, "trainannot/0.png": PNG, "trainannot/1.png": PNG}


def tar_of(files, top="", mode="w", format=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(top + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def tgz_of(files, top=""):
    return gzip.compress(tar_of(files, top), 1)


def zip_of(files, top="", method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return file.getvalue()


KINDS = {"tar": tar_of, "tar.gz": tgz_of, "zip": zip_of}


@pytest.fixture
def opened(tmp_path):
    """Called with an archive's content, opens it as tmp_path/archive until the test ends."""
    with contextlib.ExitStack() as stack:

        def open_it(data):
            (tmp_path / "archive").write_bytes(data)
            (tmp_path / "spool").mkdir(exist_ok=True)
            return stack.enter_context(open_source(tmp_path / "archive", tmp_path / "spool"))

        yield open_it


def refusal(opened, data):
    """The message with which an archive is refused; it is one line and names the archive."""
    with pytest.raises(InputError) as error:
        opened(data)
    message = str(error.value)
    assert "\n" not in message and "/archive: " in message
    return message.split("/archive: ")[1]


@contextlib.contextmanager
def less_than_10_mb():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


# What an archive holds.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", ["", "./", "CamVid/", "./some data/CamVid/"])
def test_an_archive_gives_the_records_of_its_folder(tmp_path, kind, top):
    for name, content in FILES.items():
        (tmp_path / "camvid" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "camvid" / name).write_bytes(content)
    prepare("camvid", str(tmp_path / "camvid"), str(tmp_path / "from folder"))
    archive = tmp_path / f"CamVid.{kind}"
    archive.write_bytes(KINDS[kind](FILES, top))
    if top.count("/") > 1:  # Only one folder may be round the data.
        with pytest.raises(InputError, match=r"CamVid\.\S+/some data: there is no train/ or val/"):
            prepare("camvid", str(archive), str(tmp_path / "from archive"))
        return
    prepare("camvid", str(archive), str(tmp_path / "from archive"))
    folder, again = (open_split(str(tmp_path / root), "camvid", "train") for root in ("from folder", "from archive"))
    assert again.fingerprint == folder.fingerprint
    assert [record.image for record in again] == [record.image for record in folder]
    assert sorted(path.name for path in (tmp_path / "from archive").iterdir()) == ["camvid"]


@pytest.mark.parametrize("kind", KINDS)
def test_anybody_s_data_comes_in_an_archive_too_and_problems_name_the_member(tmp_path, kind):
    names = {name.replace("trainannot", "masks/train"): content for name, content in FILES.items()}
    names = {name if name.startswith("masks") else f"images/{name}": content for name, content in names.items()}
    archive = tmp_path / f"town.{kind}"
    archive.write_bytes(KINDS[kind](names | {"classes.txt": b"\n".join(b"class%d" % i for i in range(12))}, "town/"))
    prepare("folder", str(archive), str(tmp_path / "root"), name="town")
    assert [record.id for record in open_split(str(tmp_path / "root"), "town", "train")] == ["0", "1"]
    names["images/train/1.png"] = PNG[:-20]
    archive.write_bytes(KINDS[kind](names | {"classes.txt": b"a"}, "town/"))
    with pytest.raises(InputError, match=rf"train: {archive}/town/images/train/1\.png: damaged"):
        prepare("folder", str(archive), str(tmp_path / "root"), name="city")


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_answers_as_its_folder_does(opened, tmp_path, kind):
    files = FILES | {"train/deep/er/2.png": b"x", "train/.hidden/a.png": b"", "notes.txt": b"y", ".top/x": b""}
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    folder, archive = FolderSource(tmp_path / "folder"), opened(KINDS[kind](files))

    def paths(source, inside):
        return sorted(path.removeprefix(source.root) for path in source.files(source.root + inside))

    for inside in "", "/train", "/train/deep", "/nothing", "/notes.txt":
        assert archive.folders(archive.root + inside) == folder.folders(folder.root + inside)
        assert paths(archive, inside) == paths(folder, inside)
        assert archive.has(archive.root + inside) == folder.has(folder.root + inside)
    for name, content in files.items():
        assert archive.read(f"{archive.root}/{name}") == content == folder.read(f"{folder.root}/{name}")


def test_empty_folders_are_there_and_what_a_macintosh_adds_is_not_taken_for_data(opened):
    source = opened(zip_of({"CamVid/a": b"", "CamVid/val/": b"", "__MACOSX/CamVid/a": b"", ".DS_Store": b""}))
    assert source.root.endswith("/archive/CamVid")
    assert source.folders(source.root) == ["val"] and source.files(source.root) == [f"{source.root}/a"]


def test_a_file_alone_is_not_taken_for_the_folder_of_the_data(opened):
    source = opened(zip_of({"a": b""}))
    assert source.files(source.root) == [f"{source.root}/a"]


def test_the_folder_that_is_the_archive_itself_is_no_folder_in_it(opened):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for folder in ".", "./val", "./.hidden":
            tar.addfile(special(folder, tarfile.DIRTYPE))
    source = opened(file.getvalue())
    assert source.folders(source.root) == ["val"]
    assert source.has(f"{source.root}/val") and not source.has(f"{source.root}/va")


def test_a_folder_in_the_place_of_a_file_is_told(opened):
    source = opened(zip_of({"classes.txt/": b""}))
    with pytest.raises(InputError, match=r"classes\.txt: not a file"):
        source.read(f"{source.root}/classes.txt")


def test_members_are_read_by_many_threads(opened):
    files = {f"{i}/{i}": np.random.default_rng(i).bytes(50_000) for i in range(40)}
    for make in KINDS.values():
        source = opened(make(files))
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(source.read, [f"{source.root}/{name}" for name in files] * 3))
        assert read == list(files.values()) * 3


def test_unpacking_takes_little_memory_and_leaves_no_file_even_for_a_moment(opened, tmp_path):
    data = gzip.compress(tar_of({"big": np.random.default_rng(0).bytes(20_000_000), "a/small": b"x"}), 0)
    with less_than_10_mb():
        source = opened(data)
    assert list((tmp_path / "spool").iterdir()) == []
    assert source.read(f"{source.root}/a/small") == b"x"


def test_headers_are_not_kept(opened, monkeypatch):
    alive, add = [], archives._Tar.add

    def add_and_count(*arguments):
        alive.append(sum(isinstance(thing, tarfile.TarInfo) for thing in gc.get_objects()))
        add(*arguments)

    monkeypatch.setattr(archives._Tar, "add", add_and_count)
    data = tar_of({f"a/{number}": b"" for number in range(20)})
    gc.collect()
    opened(data)
    assert max(alive) <= min(alive) + 1


# Members that are refused or passed over.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["/etc/passwd", "../up.png", "train/../../up.png", "train/..", "."])
def test_a_path_that_points_outside_is_refused(opened, kind, name):
    message = refusal(opened, KINDS[kind](FILES | {name: b"x"}))
    assert message.startswith(f"member '{name}' is no path inside the archive")


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_too_long_is_refused(opened, kind):
    opened(KINDS[kind]({"a/" * 512: b""}))
    assert refusal(opened, KINDS[kind]({"a/" * 512 + "b": b""})).startswith("a name of 1025 characters")


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_two_members_of_one_name_are_refused(opened, make):
    data = make(FILES | {"./train//0.png": b"another"})
    assert refusal(opened, data).startswith("two members are called './train//0.png'")


def test_names_that_are_not_utf_8_are_refused(opened):
    assert "is not UTF-8" in refusal(opened, tar_of({"caf\udce9.png": PNG}, format=tarfile.GNU_FORMAT))
    assert "not UTF-8" in refusal(opened, zip_of({"cafe.png": PNG}).replace(b"cafe.png", b"caf\xe9.png"))


def test_utf_8_names_without_the_flag_for_them_are_read(opened):
    source = opened(zip_of({"a/cafee.png": PNG}).replace(b"cafee", "café".encode()))
    assert source.files(source.root) == [f"{source.root}/café.png"]


@pytest.mark.parametrize("make", [tar_of, zip_of])
@pytest.mark.parametrize("name", ["two\nlines.png", "\x1b]0;title\x07.png", "c1\x9b.png"])
def test_names_with_control_characters_are_refused_and_not_printed(opened, make, name):
    message = refusal(opened, make({name: PNG}))
    assert "has control characters" in message and message.isprintable()


def special(name, kind, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_links_and_devices_are_passed_over_and_told(opened, tmp_path, capsys):
    file = io.BytesIO(tar_of(FILES, mode="w"))
    with tarfile.open(fileobj=file, mode="a") as tar:
        tar.addfile(special("train/2.png", tarfile.SYMTYPE, "/etc/passwd"))
        tar.addfile(special("train/3.png", tarfile.LNKTYPE, "train/0.png"))
        tar.addfile(special("train/4.png", tarfile.CHRTYPE))
        tar.addfile(special("train/5.png", tarfile.FIFOTYPE))
        tar.addfile(special("train/6.png", tarfile.GNUTYPE_SPARSE))
    source = opened(file.getvalue())
    assert [line.split("/archive/")[1] for line in source.passed_over] == [
        "train/2.png: a link to '/etc/passwd'",
        "train/3.png: a link to 'train/0.png'",
        "train/4.png: a device or another special file",
        "train/5.png: a device or another special file",
        "train/6.png: a device or another special file",
    ]
    assert len(source.files(source.root)) == 4
    prepare("camvid", str(tmp_path / "archive"), str(tmp_path / "root"))
    assert "5 members that are no files were not read: " in capsys.readouterr().out


def test_links_that_were_passed_over_are_told_beside_the_problems_that_they_cause(tmp_path):
    file = io.BytesIO(tar_of(FILES, mode="w"))
    with tarfile.open(fileobj=file, mode="a") as tar:
        tar.addfile(special("train/2.png", tarfile.SYMTYPE, "/data/2.png"))
        tar.addfile(special("trainannot/3.png", tarfile.LNKTYPE, "trainannot/0.png"))
    (tmp_path / "archive").write_bytes(file.getvalue())
    for missing in "trainannot/2.png", "train/3.png":
        with tarfile.open(tmp_path / "archive", mode="a") as tar:
            member = tarfile.TarInfo(missing)
            member.size = len(PNG)
            tar.addfile(member, io.BytesIO(PNG))
    with pytest.raises(InputError) as error:
        prepare("camvid", str(tmp_path / "archive"), str(tmp_path / "root"))
    first, *others, last = str(error.value).splitlines()
    assert first.startswith("problems: 2, ") and len(others) == 2
    links = f"{tmp_path}/archive/train/2.png: a link to '/data/2.png', {tmp_path}/archive/trainannot/3.png: a link to "
    assert last == f"2 members that are no files were not read: {links}'trainannot/0.png'"


def test_a_link_in_a_zip_is_passed_over(opened):
    link = zipfile.ZipInfo("train/link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    file = io.BytesIO(zip_of(FILES))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    source = opened(file.getvalue())
    assert len(source.files(source.root)) == 4
    assert source.passed_over == [f"{source.root}/train/link.png: a link"]


def test_encrypted_members_are_refused(opened):
    data = bytearray(zip_of(FILES))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    assert refusal(opened, bytes(data)).startswith("member 'train/0.png' is encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_rare_compression_which_may_ask_for_any_memory_is_refused(opened, method):
    assert "not by deflate" in refusal(opened, zip_of(FILES, method=method))


# Too much of it.


def test_too_many_members_are_refused(opened, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    for make in KINDS.values():
        assert refusal(opened, make(FILES)).startswith("more than 3 members, from 'trainannot/1.png' on")


def test_too_many_bytes_are_refused(opened, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 2 * len(PNG))
    for make in tar_of, zip_of:
        expected = f"more than {2 * len(PNG)} bytes uncompressed, from member 'trainannot/0.png' on"
        assert refusal(opened, make(FILES)).startswith(expected)
    assert refusal(opened, tgz_of(FILES)).startswith(f"unpacks to more than {2 * len(PNG)} bytes")


def test_a_bomb_is_refused_before_it_is_unpacked(opened, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_FREE_BYTES", 1_000_000)
    zeros = {"train/0.png": bytes(500_000), "train/1.png": bytes(3_000_000)}
    assert refusal(opened, zip_of(zeros)).startswith("holds more than 100 times its size, from member 'train/1.png'")
    assert refusal(opened, tgz_of(zeros)).startswith("unpacks to more than 100 times its size")


def test_members_that_share_their_compressed_bytes_are_a_bomb_too(opened, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_FREE_BYTES", 1_000_000)
    data = zip_of({"kernel": np.random.default_rng(0).bytes(100_000)})
    start = data.index(b"PK\x01\x02")
    entry, end = data[start : data.index(b"PK\x05\x06")], bytearray(data[data.index(b"PK\x05\x06") :])
    entries = b"".join(entry.replace(b"kernel", b"%06d" % i) for i in range(1000))
    struct.pack_into("<HHI", end, 8, 1000, 1000, len(entries))
    assert "holds more than 100 times its size" in refusal(opened, data[:start] + entries + bytes(end))


def test_a_small_archive_may_have_any_ratio(opened):
    source = opened(zip_of({"a/classes.txt": bytes(1_000_000)}))
    assert source.read(f"{source.root}/classes.txt") == bytes(1_000_000)


def test_a_member_that_is_too_large_is_a_problem_of_its_own(opened, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 100)
    for make in KINDS.values():
        source = opened(make({"a/large": bytes(101), "a/small": bytes(100)}))
        assert source.read(f"{source.root}/small") == bytes(100)
        with pytest.raises(InputError, match="a/large: 101 bytes are more than the limit of 100"):
            source.read(f"{source.root}/large")


def test_a_zip_that_lies_about_a_size_gives_no_more_than_it_said(opened):
    data = bytearray(zip_of({"a/b": bytes(50_000_000)}))
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.index(signature) + place, 1000)
    source = opened(bytes(data))
    with less_than_10_mb(), pytest.raises(InputError, match=r"archive/a/b: damaged"):
        source.read(f"{source.root}/b")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_asks_for_much_memory_is_refused(opened, kind):
    header = special("long", kind)
    header.size = 2_000_000
    data = tar_of(FILES)[: 1024 * 4] + header.tobuf() + bytes(2_000_000)
    assert refusal(opened, data).startswith("damaged after member 4 (a header of 20")


def test_a_list_of_members_that_asks_for_much_memory_is_refused(opened, monkeypatch):
    monkeypatch.setattr(archives, "MAX_ZIP_LIST_BYTES", 100)
    assert "a header of " in refusal(opened, zip_of(FILES))


# Damage.


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_cut_short_anywhere_is_refused_or_whole(opened, kind):
    data = KINDS[kind](FILES)
    refused = 0
    for length in {*range(0, len(data), 97), *range(0, len(data), 512), len(data) - 1}:
        try:
            source = opened(data[:length])
        except InputError as error:
            refused += 1
            assert "/archive: " in str(error) and "\n" not in str(error)
        else:
            assert [source.read(path) for path in source.files(source.root)] == [PNG] * 4
    assert refused > (5 if kind == "tar" else 0)
    if kind != "tar":  # Its end is padded with zeros, of which some may be missing.
        assert refused == len({*range(0, len(data), 97), *range(0, len(data), 512), len(data) - 1})


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(opened):
    data = bytearray(tar_of(FILES))
    data[1024 + 100] ^= 1  # The second member's.
    assert refusal(opened, bytes(data)).startswith("cut short or damaged after member 1")


@pytest.mark.parametrize("size", [-1, -512, 2**40])
def test_a_size_that_no_member_can_have_is_refused(opened, size):
    header = special("train/9.png", tarfile.REGTYPE)
    header.size = size
    data = tar_of(FILES)[: 1024 * 4] + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    assert "damaged after member 4" in refusal(opened, data)


def test_a_chain_of_headers_without_end_is_refused(opened):
    header = special("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    header.size = 5
    data = (header.tobuf(tarfile.GNU_FORMAT) + b"name".ljust(512, b"\0")) * 5000
    assert "recursion" in refusal(opened, tar_of(FILES)[: 1024 * 4] + data)


def test_a_damaged_member_is_a_problem_of_its_own(opened):
    for method in zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED:
        data = bytearray(zip_of({"a/b": PNG, "a/c": PNG}, method=method))
        data[40 + len(PNG) // 3] ^= 16
        source = opened(bytes(data))
        assert source.read(f"{source.root}/c") == PNG
        with pytest.raises(InputError, match="archive/a/b: damaged"):
            source.read(f"{source.root}/b")
    data[30 + len("a/b")] = 0xFF  # No block of deflate begins so.
    source = opened(bytes(data))
    with pytest.raises(InputError, match=r"archive/a/b: damaged .*invalid block type"):
        source.read(f"{source.root}/b")


def test_a_damaged_gzip_is_refused_though_the_tar_may_look_whole(opened):
    data = bytearray(tgz_of(FILES))
    data[-5] ^= 1  # The length.
    assert refusal(opened, bytes(data)).startswith("damaged or cut short")


def test_no_room_for_unpacking_is_told(opened, monkeypatch):
    monkeypatch.setattr(archives.tempfile, "TemporaryFile", lambda dir: contextlib.nullcontext(Full()))
    assert "no room to unpack it, with " in refusal(opened, tgz_of(FILES))


class Full(io.BytesIO):
    """A file on a disk that is full."""

    def write(self, _):
        raise OSError(28, "No space left on device")

    def fileno(self):
        return 1


@pytest.mark.parametrize(
    "data",
    [b"", b"Rar!\x1a\x07", b"7z\xbc\xaf", b"BZh9", b"text" * 1000, gzip.compress(b"no tar")],
    # gzip's header holds the time: as a name it would differ from one test process to the next.
    ids=["empty", "rar", "7z", "bzip2", "text", "gzip"],
)
def test_other_files_are_refused(opened, data):
    assert refusal(opened, data).startswith("neither a folder nor a .tar, .tar.gz (.tgz) or .zip archive")
