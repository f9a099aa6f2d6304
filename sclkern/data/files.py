"""Files below the root of the data, on a local disk or behind an fsspec URL; nothing outside the root is opened."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from sclkern.data.filesystems import open_file, open_filesystem, read_exactly, version
from sclkern.data.names import expand_names, is_plain, is_url
from sclkern.data.text import one_line
from sclkern.errors import UserError
from sclkern.io import write_atomically


def cache_folder() -> Path:
    """Where copies of remote files and indices of read-only folders lie: ``SCLKERN_CACHE``, or ~/.cache/sclkern."""
    return Path(os.environ.get("SCLKERN_CACHE") or Path.home() / ".cache" / "sclkern")


@dataclass(frozen=True)
class FileInfo:
    """A version of a file.

    Attributes:
        size: bytes.
        stamp: text that changes when the file is written again: nanoseconds of its mtime, or an ETag; may be empty.
    """

    size: int
    stamp: str


class DataFolder:
    """A folder of data. Names of files are relative to it, with "/".

    A name that is absolute or has "..", and a symbolic link that leads out of the folder, are refused: both may come
    from a file that somebody else has written. It can be pickled, and used in forked processes.

    Args:
        root: local folder, or an fsspec URL such as ``s3://bucket/folder``, ``https://host/folder``,
            ``memory://folder``; ``file://`` is a local folder.

    Attributes:
        root: the folder, for messages.
        local_root: the local folder; None behind a URL.

    Raises:
        UserError: the URL's protocol is unknown or needs a package that is not installed.
    """

    root: str
    local_root: Path | None

    def __init__(self, root: str | Path) -> None:
        self.root = str(root).rstrip("/") or "/"
        self.local_root = None if is_url(root) else Path(root)
        self._remote_root = ""
        if self.local_root is None:
            filesystem, self._remote_root = open_filesystem(str(root))
            self._remote_root = self._remote_root.rstrip("/")
            if isinstance(filesystem, LocalFileSystem):
                self.local_root = Path(self._remote_root or "/")

    def shown(self, name: str = "") -> str:
        """A file of the folder, for messages; of the folder itself by default."""
        return one_line(f"{self.root}/{name}" if name else self.root, 300)

    def path(self, name: str) -> Path:
        """Local path of a file or folder, which need not exist.

        Args:
            name: relative to the root.

        Returns:
            The path.

        Raises:
            UserError: the name or a link leads out of the folder, or the folder is behind a URL (see ``local_copy``).
        """
        self._check_name(name)
        if self.local_root is None:
            raise UserError(f"{self.shown(name)}: is behind a URL, expected a local file; copy it to a local disk")
        local = self.local_root / name
        real, real_root = os.path.realpath(local), os.path.realpath(self.local_root)
        if real != real_root and not real.startswith(os.path.join(real_root, "")):
            raise UserError(
                f"{self.shown(name)}: a symbolic link leads out of the folder, to {one_line(real, 200)}, expected a "
                "file in it; copy the file there, or set data.root to a folder that holds both"
            )
        return local

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading.

        Args:
            name: relative to the root.

        Returns:
            The file, which can seek.

        Raises:
            UserError: the file is missing, cannot be opened or lies outside the folder.
        """
        with self._reading(name):
            if self.local_root is not None:
                return open(self.path(name), "rb", opener=open_file)
            filesystem, path = self._remote(name)
            return filesystem.open(path, "rb")

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read a file, or a range of it.

        Args:
            name: relative to the root.
            start: first byte.
            length: bytes; None reads to the end.

        Returns:
            The content, of this length.

        Raises:
            UserError: the file is missing, cannot be read, is shorter or lies outside the folder.
        """
        with self._reading(name):
            if self.local_root is not None:
                with open(self.path(name), "rb", 0 if length is not None else -1, opener=open_file) as file:
                    file.seek(start)
                    content = file.read() if length is None else read_exactly(file, length)
            else:
                filesystem, path = self._remote(name)
                content = filesystem.cat_file(path, start=start, end=None if length is None else start + length)
        if length is not None and len(content) > length:
            raise UserError(
                f"{self.shown(name)}: the server gave {len(content)} bytes, expected the {length} from byte {start}, "
                "as it cannot give a range of a file; copy the folder to a local disk, or use another server"
            )
        if length is not None and len(content) < length:
            raise UserError(
                f"{self.shown(name)}: ends at byte {start + len(content)}, expected {start + length} or more; it has "
                "changed since it was indexed, or was cut short: copy it again"
            )
        return content

    def info(self, name: str) -> FileInfo | None:
        """Size and version of a file; None where there is no such file."""
        if self.local_root is not None:
            local = self.path(name)
            if not local.is_file():
                return None
            status = local.stat()
            return FileInfo(status.st_size, str(status.st_mtime_ns))
        with self._reading(name):
            filesystem, path = self._remote(name)
            try:
                found: dict[str, Any] = filesystem.info(path)
            except FileNotFoundError:
                return None
            if found.get("type") == "directory":
                return None
            if found.get("size") is None:
                raise UserError(f"{self.shown(name)}: the server gives no size; copy the folder to a local disk")
            return FileInfo(int(found["size"]), version(filesystem, path, found))

    def is_dir(self, name: str = "") -> bool:
        """Whether there is such a folder; of the root itself by default."""
        if self.local_root is not None:
            return self.path(name).is_dir() if name else self.local_root.is_dir()
        with self._reading(name):
            filesystem, path = self._remote(name)
            return bool(filesystem.isdir(path))

    def names_in(self, name: str = "", *, folders: bool = False) -> set[str]:
        """Names of the files in a folder, without those in folders below it; empty where there is no such folder.

        Args:
            name: folder relative to the root; by default the root.
            folders: give the names of the folders in it instead, without those that begin with ".".

        Returns:
            The names, without the folder.

        Raises:
            UserError: the folder lies outside, or cannot be listed.
        """
        if not self.is_dir(name):
            return set()
        with self._reading(name):
            if self.local_root is not None:
                with os.scandir(self.path(name) if name else self.local_root) as entries:
                    listed = [(entry.name, entry.is_dir()) for entry in entries]
            else:
                filesystem, path = self._remote(name)
                listed = [
                    (entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory")
                    for entry in filesystem.ls(path, detail=True)
                ]
        return {entry for entry, is_dir in listed if is_dir == folders and not (folders and entry.startswith("."))}

    def glob(self, pattern: str) -> list[str]:
        """Names of the files that fit a pattern, sorted; files whose own name begins with "." are left out.

        Args:
            pattern: with ``*``, ``?``, ``[...]`` and ``**``, relative to the root.

        Returns:
            The names.

        Raises:
            UserError: the pattern leads out of the folder, or the folder cannot be listed.
        """
        self._check_name(pattern)
        if self.local_root is not None:
            found = [
                path.relative_to(self.local_root).as_posix() for path in self.local_root.glob(pattern) if path.is_file()
            ]
        else:
            with self._reading(pattern):
                filesystem, remote = self._remote(pattern)
                skip = len(self._remote("")[1].rstrip("/")) + 1
                entries = filesystem.glob(remote, detail=True).items()
                found = [name.rstrip("/")[skip:] for name, entry in entries if entry["type"] != "directory"]
        return sorted(name for name in found if not name.rpartition("/")[2].startswith("."))

    def tables(self, tables: Sequence[str], suffixes: Sequence[str]) -> list[str]:
        """Names of the files of tables.

        A table is a name without its suffix, such as ``"shards/00000"``; it may have ranges and lists in braces,
        ``"{00000..00331}"`` or ``"coco_{train,val}"``, or be a pattern with ``*``, ``?`` or ``[...]``, whose files are
        taken sorted by name. A file of exactly this name goes before either.

        Args:
            tables: names, at least one.
            suffixes: of the format's files, such as ``".tar"``.

        Returns:
            The names with their suffixes, table after table; the files of a name without a pattern need not exist.

        Raises:
            UserError: no table is named, a pattern has no file, or a name has files of several suffixes.
        """
        if not tables:
            raise UserError(
                f"{self.root}: no table is named, expected the names of one or more {' or '.join(suffixes)} files, "
                "without the suffix"
            )
        files: list[str] = []
        for table in tables:
            there = self._of_name(table, suffixes)
            for name in [table] if there else expand_names(table):
                there = there or self._of_name(name, suffixes)
                if not there and re.search(r"[*?[]", name):
                    there = sorted({found for suffix in suffixes for found in self.glob(name + suffix)})
                    if not there:
                        raise UserError(
                            f"{self.root}: no file {name}{' or '.join(suffixes)}, expected one or more; correct the "
                            "names of the tables"
                        )
                elif len(there) > 1:
                    raise UserError(
                        f"{self.root}: has {' and '.join(there)}, expected one file of the table {name!r}; name it "
                        "with its suffix"
                    )
                files += there or [name + suffixes[0]]
                there = []
        return files

    def local_copy(self, name: str) -> Path:
        """Local path of a file's content: the file itself, or a copy in ``cache_folder`` of what a URL gives.

        Args:
            name: relative to the root.

        Returns:
            A path that exists. A copy is made once for each version of the file, and is whole.

        Raises:
            UserError: there is no such file, or no room for the copy.
        """
        if self.local_root is not None:
            return self.path(name)
        info = self.info(name)
        if info is None:
            raise UserError(f"{self.shown(name)}: no such file; correct data.root or the name")
        version = hashlib.blake2b(f"{self.root}\n{name}\n{info}".encode(), digest_size=12).hexdigest()
        copy = cache_folder() / "copies" / version / name.rpartition("/")[2]
        if not (copy.is_file() and copy.stat().st_size == info.size):
            write_atomically(copy, lambda path: self._download(name, path, info.size))
        return copy

    def _download(self, name: str, path: Path, size: int) -> None:
        with self.open(name) as source, open(path, "wb") as target, self._reading(name):
            shutil.copyfileobj(source, target, 1 << 22)
        if path.stat().st_size != size:
            raise UserError(f"{self.shown(name)}: gave {path.stat().st_size} bytes, expected {size}; try again")

    def _of_name(self, name: str, suffixes: Sequence[str]) -> list[str]:
        """Files of exactly this name, with one of the suffixes given or to be added."""
        self._check_name(name)
        candidates = [name] if name.endswith(tuple(suffixes)) else []
        candidates += [name + suffix for suffix in suffixes]
        return [file for file in candidates if self.info(file) is not None]

    def _check_name(self, name: str) -> None:
        if not is_plain(name):
            raise UserError(
                f"{self.root}: the name {one_line(name, 200)!r} leads out of the folder or is not plain, expected one "
                "relative to it, with '/', without '..'; correct the name, or set data.root to a folder above"
            )

    def _remote(self, name: str) -> tuple[Any, str]:
        """The file system and the path there; made anew in each process, as connections do not survive a fork."""
        self._check_name(name)
        filesystem, _ = open_filesystem(self.root)
        return filesystem, f"{self._remote_root}/{name}" if name else self._remote_root

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turn whatever a file system raises into one line with the name of the file."""
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(f"{self.shown(name)}: no such file; correct data.root or the name") from error
        except OSError as error:
            reason = one_line(error.strerror or str(error), 200) or type(error).__name__
            raise UserError(
                f"{self.shown(name)}: cannot be read ({reason}); correct its permissions, or replace it"
            ) from error
        except Exception as error:  # clients of stores raise errors of their own
            if self.local_root is not None:
                raise
            reason = one_line(str(error), 200) or type(error).__name__
            raise UserError(f"{self.shown(name)}: cannot be read ({reason}); correct the URL or try again") from error
