"""Pictures in one folder: files in it are read, whatever else is named is not. Row 10."""

from __future__ import annotations

import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_engine.errors import RequestError, StartupError
from mm_engine.inputs.local_files import MediaFolder
from mm_engine.inputs.media import ImageSource, MediaLimits, load_images
from pictures import encode, quarters

PICTURE = encode(quarters())
REFUSED = "the image is no file in the folder that this server reads from"


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """The folder, beside a picture that isn't in it and a folder whose name begins alike."""
    folder = tmp_path / "allowed"
    (folder / "below").mkdir(parents=True)
    for place in (folder, folder / "below", tmp_path):
        (place / "picture.png").write_bytes(PICTURE)
    (tmp_path / "allowed-not-really").mkdir()
    (tmp_path / "allowed-not-really" / "picture.png").write_bytes(PICTURE)
    return folder


def read(folder: Path, url: str, limits: MediaLimits | None = None) -> bytes:
    return MediaFolder(folder).read(ImageSource(url, "field"), limits or MediaLimits())


@pytest.mark.parametrize(
    "url",
    [
        "file://{allowed}/picture.png",
        "file://{allowed}/below/picture.png",
        "FILE://localhost{allowed}/picture.png",
        "file://{allowed}/p%69cture.png",
        "file://{allowed}/below/../picture.png",
        "file://{allowed}//picture.png",
        "file://{allowed}/link.png",
        "file://{allowed}/b%C3%BCcher.png",
        "file://{allowed}/bücher.png",
        "file://{outside}/entrance/picture.png",
    ],
)
def test_files_in_the_folder_are_read(allowed: Path, url: str) -> None:
    """Row 10, the positive control; links that lead to such files are followed."""
    (allowed / "link.png").symlink_to(allowed / "below" / "picture.png")
    (allowed / "bücher.png").write_bytes(PICTURE)
    (allowed.parent / "entrance").symlink_to(allowed)
    url = url.format(allowed=allowed, outside=allowed.parent)
    assert read(allowed, url) == PICTURE
    (image,) = load_images([ImageSource(url, "field")], MediaLimits(), MediaFolder(allowed))
    assert image.size == (24, 16)


def test_a_folder_that_is_itself_a_link_is_what_it_leads_to(allowed: Path) -> None:
    link = allowed.parent / "link"
    link.symlink_to(allowed)
    assert read(link, f"file://{allowed}/picture.png") == PICTURE
    assert read(link, f"file://{link}/picture.png") == PICTURE


@pytest.mark.parametrize(
    "url",
    [
        "file://{outside}/picture.png",
        "file://{outside}/allowed-not-really/picture.png",
        "file://{allowed}/../picture.png",
        "file://{allowed}/%2e%2e/picture.png",
        "file://{allowed}/..%2fpicture.png",
        "file://{allowed}/below/../../picture.png",
        "file://{allowed}-not-really/picture.png",
        "file://{allowed}/out.png",
        "file://{allowed}/out/picture.png",
        "file://{allowed}/below/out.png",
        "file://{allowed}/picture.png%00",
        "file://{allowed}/picture.png\0",
        "file://{allowed}%00/../picture.png",
        "file://{allowed}/picture.png?a",
        "file://{allowed}/picture.png#a",
        "file://{allowed}/picture.png/..%2f../picture.png",
        "file://{allowed}",
        "file://{allowed}/",
        "file://{allowed}/below",
        "file://{allowed}/missing.png",
        "file://{allowed}/loop",
        "file://{allowed}/%ff.png",
        "file://{allowed}/\ud800.png",
        "file://{allowed}/" + "a" * 5000,
        "file://{allowed}/" + "a/" * 5000,
        "file://example.com{allowed}/picture.png",
        "file://127.0.0.1{allowed}/picture.png",
        "file://localhost:80{allowed}/picture.png",
        "file://user@localhost{allowed}/picture.png",
        "file:{allowed}/picture.png",
        "file:/{allowed}/picture.png",
        "file://",
        "file:///",
        "file://.",
        "file:picture.png",
        "file://~/picture.png",
        "file:///proc/self/cwd{allowed}/picture.png",
        "file:///proc/self/environ",
        "file:///dev/zero",
        "file:///etc/passwd",
        " file://{allowed}/picture.png",
    ],
)  # fmt: skip
def test_what_is_not_in_the_folder_is_refused(allowed: Path, url: str) -> None:
    """Row 10: `..`, links out, names that begin alike, percent-encoding, NUL, other hosts."""
    (allowed / "out.png").symlink_to(allowed.parent / "picture.png")
    (allowed / "below" / "out.png").symlink_to("../../picture.png")
    (allowed / "out").symlink_to(allowed.parent)
    (allowed / "loop").symlink_to("loop")
    url = url.format(allowed=allowed, outside=allowed.parent)
    with pytest.raises(RequestError) as raised:
        load_images([ImageSource(url, "field")], MediaLimits(), MediaFolder(allowed))
    assert str(raised.value).startswith(REFUSED)
    assert (raised.value.param, raised.value.status) == ("field", 400)
    assert "picture" not in str(raised.value) and str(allowed) not in str(raised.value)


def test_what_is_no_regular_file_is_refused_at_once(allowed: Path) -> None:
    """Row 10: a pipe that nobody writes to would hold up a thread for ever."""
    os.mkfifo(allowed / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(allowed)  # a socket's path may have 100 characters
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        for name in ("pipe", "socket", "below"):
            url = f"file://{allowed}/{name}"
            with ThreadPoolExecutor(1) as pool:
                attempt = pool.submit(read, allowed, url)
                try:
                    error = attempt.exception(timeout=10)
                finally:
                    release(allowed / "pipe")
                assert isinstance(error, RequestError), name
                assert str(error).startswith(REFUSED)


def release(pipe: Path) -> None:
    """Let go whoever waits for a writer."""
    with contextlib.suppress(OSError):
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


def test_a_file_over_the_limit_is_refused_unread(allowed: Path) -> None:
    with (allowed / "large.png").open("wb") as file:
        file.truncate(2**40)  # a hole: there is no room for so much
    with pytest.raises(RequestError, match="over 10485760 bytes"):
        read(allowed, f"file://{allowed}/large.png")
    assert read(allowed, f"file://{allowed}/picture.png", MediaLimits(max_bytes=len(PICTURE)))
    with pytest.raises(RequestError, match=f"over {len(PICTURE) - 1} bytes"):
        read(allowed, f"file://{allowed}/picture.png", MediaLimits(max_bytes=len(PICTURE) - 1))


def test_a_link_put_in_after_the_check_is_not_followed(
    allowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 10, raced: the path is resolved, then a part of it becomes a link out."""
    folder, opened = MediaFolder(allowed), MediaFolder._open

    def swap(self: MediaFolder, relative: Path) -> int:
        if relative.parts[0] == "below":
            (allowed / "below").rename(allowed / "before")
            (allowed / "below").symlink_to(allowed.parent)
        else:
            (allowed / relative).unlink()
            (allowed / relative).symlink_to(allowed.parent / "picture.png")
        return opened(self, relative)

    monkeypatch.setattr(MediaFolder, "_open", swap)
    for name in ("below/picture.png", "picture.png"):
        with pytest.raises(RequestError, match=REFUSED):
            folder.read(ImageSource(f"file://{allowed}/{name}", "field"), MediaLimits())


def test_no_descriptor_stays_open(allowed: Path) -> None:
    process = psutil.Process()
    before = process.num_fds()
    for name in ("picture.png", "below/picture.png", "below", "missing", "below/picture.png/a"):
        for _ in range(3):
            try:
                read(allowed, f"file://{allowed}/{name}")
            except RequestError:
                continue
    assert process.num_fds() == before


def test_all_bytes_of_a_request_are_counted(allowed: Path) -> None:
    url = f"file://{allowed}/picture.png"
    given = [ImageSource(url, str(number)) for number in range(3)]
    both = MediaLimits(max_total_bytes=2 * len(PICTURE))
    assert len(load_images(given[:2], both, MediaFolder(allowed))) == 2
    with pytest.raises(RequestError, match="bytes together") as raised:
        load_images(given, both, MediaFolder(allowed))
    assert raised.value.param == "2"


@pytest.mark.parametrize("name", ["missing", "file", "\0"])
def test_a_folder_that_is_none_is_refused_at_startup(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StartupError, match="--allowed-local-media-path is no folder"):
        MediaFolder(f"{tmp_path}/{name}")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30), start=st.sampled_from(["", "/", "/../", "/below/", "/%2e%2e"]))
def test_any_path_is_a_picture_of_the_folder_or_refused(
    allowed: Path, text: str, start: str
) -> None:
    try:
        came = read(allowed, f"file://{allowed}{start}{text}")
    except RequestError as error:
        came = str(error).encode()
    assert came == PICTURE or came.startswith(REFUSED.encode())
