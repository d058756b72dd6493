"""Pictures in one folder of this machine, for file URLs; nothing outside of it can be read.

Whatever is wrong with a URL gets the same sentence, so that nobody learns by asking which files
there are. The exception is a picture that is too long: it has been found by then.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes

from mm_engine.errors import RequestError, StartupError
from mm_engine.inputs.media import ImageSource, MediaLimits, too_long

_FILE_URL = re.compile(r"file://(?:localhost)?(/[^?#]*)", re.IGNORECASE)
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Without O_NONBLOCK, opening a pipe would wait until somebody writes to it.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class MediaFolder:
    """A folder whose files may be read, those in its folders too."""

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            StartupError: it is no folder.
        """
        try:
            self._path = Path(path).resolve(strict=True)
            is_folder = self._path.is_dir()
        except (OSError, RuntimeError, ValueError):
            is_folder = False
        if not is_folder:
            raise StartupError(
                f"--allowed-local-media-path is no folder: {path}. Name one that exists."
            )

    def read(self, source: ImageSource, limits: MediaLimits) -> bytes:
        """The bytes of the file that a file URL names. Blocks, as disks do.

        Raises:
            RequestError: it is no file URL of a file in this folder, or it is too long.
        """
        found = _FILE_URL.fullmatch(source.url)
        try:
            if found is None:
                raise ValueError
            wanted = Path(os.fsdecode(unquote_to_bytes(found[1]))).resolve(strict=True)
            descriptor = self._open(wanted.relative_to(self._path))
            try:
                state = os.fstat(descriptor)
                if not stat.S_ISREG(state.st_mode):
                    raise ValueError
                if state.st_size > limits.max_bytes:
                    raise too_long(limits, source.param)
                with open(descriptor, "rb", closefd=False) as file:
                    # One more than it may have: it might grow meanwhile. Whoever gets it counts.
                    return file.read(limits.max_bytes + 1)
            finally:
                os.close(descriptor)
        except (OSError, RuntimeError, ValueError):
            raise RequestError(
                "the image is no file in the folder that this server reads from. "
                "Send a file URL with the whole path: file:///folder/image.png.",
                param=source.param,
            ) from None

    def _open(self, relative: Path) -> int:
        """A descriptor of a file below the folder.

        Links have been followed by now, and none may be met again: where one is put into the path
        in the meantime, opening fails.
        """
        *folders, name = relative.parts or (".",)
        at = os.open(self._path, _FOLDER_FLAGS)
        try:
            for folder in folders:
                below = os.open(folder, _FOLDER_FLAGS, dir_fd=at)
                os.close(at)
                at = below
            return os.open(name, _FILE_FLAGS, dir_fd=at)
        finally:
            os.close(at)
