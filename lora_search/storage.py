"""A folder of a file system or an object store. Bytes in, bytes out; a file is complete, or it is not there."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

T = TypeVar("T")

PATIENCE_S = 300.0
"""How long an object store that fails is asked again. Besides, pyarrow asks up to 11 times within each of our calls."""

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0

REFUSED = re.compile(
    r"AWS Error (\w*(ACCESS_DENIED|NO_SUCH_BUCKET|ACCESS_KEY|SIGNATURE|TOKEN)|\w+ \(HTTP status 4(?!08|29)\d\d)"
    r"|Bucket '[^']*' not found|google::cloud::Status\((PERMISSION_DENIED|UNAUTHENTICATED)\b"
)
"""What pyarrow says of a fault that stays; any other of an object store may pass. Names of objects stand there too."""


class StoreError(OSError):
    """An object store refuses, or has failed for as long as it was asked."""


class Folder:
    """A folder by its path, or by a URI that pyarrow knows (`s3://bucket/prefix`, `gs://bucket/prefix`).

    An object store that fails is asked again, with exponential backoff; every method may raise StoreError.
    """

    def __init__(self, place: str | Path, patience_s: float = PATIENCE_S) -> None:
        self.place = str(place)
        self._patience_s = patience_s
        self._opened: tuple[FileSystem, str] | None = None

    def __reduce__(self) -> tuple[type[Folder], tuple[str, float]]:
        """A file system's client stays in its process."""
        return Folder, (self.place, self._patience_s)

    def below(self, name: str) -> Folder:
        """A folder inside of this one."""
        address, mark, options = self.place.partition("?")
        return Folder(f"{address.rstrip('/')}/{name}{mark}{options}", self._patience_s)

    def names(self) -> list[str]:
        """Of the files and folders inside, sorted; none where the folder is not there."""
        from pyarrow.fs import FileSelector

        def names(system: FileSystem, path: str) -> list[str]:
            # Of Google's store pyarrow lists the objects alone, not the folders that their names make (26.0).
            whole = system.type_name == "gcs"
            found = system.get_file_info(FileSelector(path, allow_not_found=True, recursive=whole))
            return sorted({entry.path.removeprefix(f"{path}/").partition("/")[0] for entry in found})

        return self._ask(names)

    def modified(self, name: str) -> datetime | None:
        """When a file was last written, by the file system's own clock; None where it is not there."""

        def modified(system: FileSystem, path: str) -> datetime | None:
            found: datetime | None = system.get_file_info(f"{path}/{name}").mtime
            return found

        return self._ask(modified)

    def read(self, name: str) -> bytes:
        """
        Raises:
            OSError: the file is not there, or cannot be read.
        """

        def read(system: FileSystem, path: str) -> bytes:
            with system.open_input_stream(f"{path}/{name}") as stream:
                return bytes(stream.read())

        return self._ask(read)

    def write(self, name: str, content: bytes) -> None:
        """Where a link stands in its place, the file replaces the link.

        Raises:
            OSError: there is no room, or no right to write.
        """

        def write(system: FileSystem, path: str) -> None:
            local = _is_local(system)  # an object appears when it is complete, and needs no folder
            # A name that nobody knows: another writer has its own, and a link that waits there is not followed.
            target = f"{path}/.{name}.{uuid.uuid4().hex}.part" if local else f"{path}/{name}"
            if local:
                system.create_dir(path)
            try:
                with system.open_output_stream(target) as stream:
                    stream.write(content)
                if local:
                    system.move(target, f"{path}/{name}")
            except OSError:
                if local:
                    with suppress(OSError):
                        system.delete_file(target)
                raise

        self._ask(write)

    def upload(self, folder: Path) -> None:
        """Copy all files below a local folder into this one, of whatever size."""

        def copy(file: Path) -> Callable[[FileSystem, str], None]:
            def copy(system: FileSystem, path: str) -> None:
                target = f"{path}/{file.relative_to(folder).as_posix()}"
                if _is_local(system):
                    system.create_dir(target.rpartition("/")[0])
                with file.open("rb") as source, system.open_output_stream(target) as stream:
                    shutil.copyfileobj(source, stream, 16 << 20)

            return copy

        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self._ask(copy(file))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all it holds, from this one; nothing happens where it is not there."""
        self._ask(lambda system, path: _remove(system, f"{path}/{name}"))

    def remove_all(self) -> None:
        """Remove this folder itself, with all it holds."""
        self._ask(_remove)

    def check(self) -> None:
        """Write a file, read it back and remove it.

        Raises:
            OSError, ValueError: that cannot be done, or the URI is none.
        """
        name, content = f".probe-{uuid.uuid4().hex}", b"lora-search"
        self.write(name, content)
        if self.read(name) != content:
            raise StoreError(f"{self.place}: a file that was written reads differently")
        self.remove(name)

    def _ask(self, do: Callable[[FileSystem, str], T]) -> T:
        """Call with file system and path; an object store again, until it is done or patience ends.

        To open one is to ask it too: where a bucket's region is not given, pyarrow asks for it.
        """
        if not is_uri(self.place):
            return do(*self._open())
        end = time.monotonic() + self._patience_s
        for attempt in itertools.count():
            delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempt) * random.uniform(0.5, 1)
            try:
                return do(*self._open())
            except FileNotFoundError:
                raise
            except OSError as error:
                if self._opened is not None and _is_local(self._opened[0]):  # file://
                    raise
                if REFUSED.search(str(error)) or time.monotonic() + delay > end:
                    raise StoreError(f"{self.place}: {error}") from error
            time.sleep(delay)
        raise AssertionError

    def _open(self) -> tuple[FileSystem, str]:
        if self._opened is None:
            from pyarrow.fs import FileSystem, LocalFileSystem

            if not is_uri(self.place):
                self._opened = LocalFileSystem(), str(Path(self.place).expanduser().resolve())
            elif self.place.startswith("s3://") and "allow_delayed_open" not in self.place:
                mark = "&" if "?" in self.place else "?"
                self._opened = FileSystem.from_uri(f"{self.place}{mark}allow_delayed_open=true")  # one request a file
            else:
                self._opened = FileSystem.from_uri(self.place)
        return self._opened


def is_uri(place: str | Path) -> bool:
    return "://" in str(place)


def _is_local(system: FileSystem) -> bool:
    return bool(system.type_name == "local")


def _remove(system: FileSystem, path: str) -> None:
    from pyarrow.fs import FileType

    match system.get_file_info(path).type:
        case FileType.Directory:
            with suppress(FileNotFoundError):  # in Google's store a folder need not be an object of its own
                system.delete_dir(path)
        case FileType.File:
            system.delete_file(path)
