"""A folder of a file system or an object store. Bytes in, bytes out; a file is complete, or it is not there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


class Folder:
    """A folder by its path, or by a URI that pyarrow knows (`s3://bucket/prefix`, `gs://bucket/prefix`)."""

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        self._opened: tuple[FileSystem, str] | None = None

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        """A file system's client stays in its process."""
        return Folder, (self.place,)

    def below(self, name: str) -> Folder:
        """A folder inside of this one."""
        address, mark, options = self.place.partition("?")
        return Folder(f"{address.rstrip('/')}/{name}{mark}{options}")

    def names(self) -> list[str]:
        """Of the files and folders inside, sorted; none where the folder is not there."""
        from pyarrow.fs import FileSelector

        system, path = self._open()
        return sorted(entry.base_name for entry in system.get_file_info(FileSelector(path, allow_not_found=True)))

    def read(self, name: str) -> bytes:
        """
        Raises:
            OSError: the file is not there, or cannot be read.
        """
        system, path = self._open()
        with system.open_input_stream(f"{path}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        """
        Raises:
            OSError: there is no room, or no right to write.
        """
        from pyarrow.fs import LocalFileSystem

        system, path = self._open()
        system.create_dir(path)
        local = isinstance(system, LocalFileSystem)  # an object appears when it is complete
        target = f"{path}/.{name}.part" if local else f"{path}/{name}"
        with system.open_output_stream(target) as stream:
            stream.write(content)
        if local:
            system.move(target, f"{path}/{name}")

    def remove(self, name: str) -> None:
        """Remove a folder inside of this one, with all it holds."""
        system, path = self._open()
        system.delete_dir(f"{path}/{name}")

    def remove_file(self, name: str) -> None:
        """Remove a file inside of this folder."""
        system, path = self._open()
        system.delete_file(f"{path}/{name}")

    def _open(self) -> tuple[FileSystem, str]:
        if self._opened is None:
            from pyarrow.fs import FileSystem, LocalFileSystem

            if "://" in self.place:
                self._opened = FileSystem.from_uri(self.place)
            else:
                self._opened = LocalFileSystem(), str(Path(self.place).expanduser().resolve())
        return self._opened
