"""The disk tier of a store: a folder that many processes, models and tenants may share.

    folder/kvfx-segments           what the folder is
    folder/<owner>/<key>.safetensors        a segment; its mtime is when it was last used
    folder/<owner>/<key>.refused            what was found in its place and is not believed
    folder/<owner>/<random>.partial         a file that is being written

There are no locks: files appear whole by being renamed, and whoever has opened one can read it to
its end after another process deleted it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from kvfx.errors import StoreError
from kvfx.reuse.owner import KIND, Owner
from kvfx.reuse.segment import Segment, Stored, is_hash
from kvfx.reuse.segment_file import decode, decode_facts, encode
from kvfx.reuse.stats import Stats

MARKER = "kvfx-segments"
SEGMENT, REFUSED, PARTIAL = ".safetensors", ".refused", ".partial"
# seconds after which nobody is still writing a partial file
STALE = 600.0
# a link is not followed, and a pipe does not block
FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

Found = TypeVar("Found")


class SegmentFiles:
    """The segments of `owner` in `folder`, which holds `budget` bytes of files of all owners; LRU
    over all processes. Several that write at the same moment may hold more until they are done.

    Nothing but opening it raises for what is on the disk: that is a refusal in `stats`, and a miss.
    """

    def __init__(self, folder: Path, budget: int, owner: Owner, stats: Stats) -> None:
        self.root, self.budget, self.owner, self.stats = folder, budget, owner, stats
        self.folder = folder / owner.folder
        self._clock = 0
        # by key: the file that was read, and what it said; None where it was refused
        self._seen: dict[str, tuple[int, Stored | None]] = {}
        try:
            _claim(folder)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if self.folder.is_symlink():
                raise StoreError(f"{self.folder} is a link to somewhere else: remove it")
            list(self.folder.iterdir())
        except OSError as error:
            raise StoreError(f"{folder} cannot hold segments: {error}") from error
        self._files()

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the folder, of all owners, except the marker."""
        return sum(facts.st_size for _, facts in self._files())

    def write(self, key: str, segment: Segment) -> None:
        """Store `segment`, unless one at least as near to exact arithmetic is there."""
        there = self._open(key, decode_facts)
        if there is not None and there.depth <= segment.depth:
            return self.touch(key)
        try:
            data = encode(segment, self.owner)
            if not self._make_room(len(data)):
                raise StoreError(f"{len(data):,} bytes do not fit into disk={self.budget:,}")
            self._write(key, data)
        except (OSError, StoreError) as error:
            return self.stats.refuse(key, f"not written to {self.folder}: {error}")
        # another process may have written at the same time
        self._make_room(0)

    def read(self, key: str) -> Segment | None:
        """The segment under `key`, checked; it is now the one that was used last."""
        segment = self._open(key, decode)
        if segment is not None:
            self.touch(key)
        return segment

    def touch(self, key: str) -> None:
        """Make it the one that was used last. A folder that is only to be read stays as it is."""
        with contextlib.suppress(OSError):
            self._stamp(self._path(key))

    def scan(self) -> dict[str, Stored]:
        """What is stored now; headers are read once per file."""
        try:
            with os.scandir(self.folder) as entries:
                found = {
                    entry.name.removesuffix(SEGMENT): entry.inode()
                    for entry in entries
                    if entry.name.endswith(SEGMENT) and is_hash(entry.name.removesuffix(SEGMENT))
                }
        except OSError as error:
            self.stats.refuse(str(self.folder), error)
            found = {}
        self._seen = {key: seen for key, seen in self._seen.items() if found.get(key) == seen[0]}
        for key in sorted(found.keys() - self._seen.keys()):
            self._seen[key] = (found[key], self._open(key, decode_facts))
        return {key: stored for key, (_, stored) in self._seen.items() if stored is not None}

    def remove(self, key: str) -> None:
        """Delete the file under `key`, if there is one."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            self.stats.refuse(key, f"not removed: {error}")

    def clear(self) -> None:
        """Delete every file of the owner that is not just being written."""
        for path, _ in self._files():
            if path.parent == self.folder and path.suffix != PARTIAL:
                _unlink(path)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SEGMENT}"

    def _open(self, key: str, read: Callable[[BinaryIO, str, Owner], Found]) -> Found | None:
        """What `read` finds in the file under `key`; what it does not believe is put aside."""
        path = self._path(key)
        try:
            with open(path, "rb", opener=_opened) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError("it is no regular file")
                try:
                    return read(file, key, self.owner)
                except StoreError as error:
                    self.stats.refuse(path.name, error)
                    _put_aside(path, file)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.stats.refuse(path.name, error)
        return None

    def _write(self, key: str, data: bytes) -> None:
        """The whole file or none, on the disk before it has its name."""
        descriptor, name = tempfile.mkstemp(PARTIAL, dir=self.folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._stamp(Path(name))
            os.replace(name, self._path(key))
        except BaseException:
            _unlink(Path(name))
            raise

    def _stamp(self, path: Path) -> None:
        # the clock of a file system ticks too slowly to order what is used in quick succession
        self._clock = max(self._clock + 1, time.time_ns())
        os.utime(path, ns=(self._clock, self._clock))

    def _make_room(self, size: int) -> bool:
        """Make `size` bytes fit: delete what is not believed, then what was used least recently."""
        files = list(self._files())
        used = size + sum(facts.st_size for _, facts in files)
        files.sort(key=lambda file: (file[0].suffix != REFUSED, file[1].st_mtime_ns, file[0]))
        # what can never fit costs nothing that is stored
        if size > self.budget:
            return False
        for path, facts in files:
            if used <= self.budget:
                break
            if path.suffix != PARTIAL and _unlink(path):
                used -= facts.st_size
                self.stats.evictions += path.suffix == SEGMENT
        return used <= self.budget

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """All files of all owners, after those are deleted that a killed writer left behind."""
        files = []
        for path in _listed(self.root):
            try:
                facts = path.lstat()
            except OSError:
                # another process was faster
                continue
            stale = path.suffix == PARTIAL and time.time() - facts.st_mtime > STALE
            if not stale or not _unlink(path):
                files.append((path, facts))
        return files


def _claim(folder: Path) -> None:
    """Make sure that `folder` is one for segments; a new or an empty one becomes one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    marker = folder / MARKER
    if not marker.exists():
        others = [path.name for path in folder.iterdir() if path.suffix != PARTIAL]
        # another process may have claimed it since
        if others and not marker.exists():
            raise StoreError(
                f"{folder} belongs to something else (it has {min(others)!r}): give a new folder"
            )
        descriptor, name = tempfile.mkstemp(PARTIAL, dir=folder)
        with os.fdopen(descriptor, "w") as file:
            file.write(KIND)
        os.replace(name, marker)
    found = marker.read_bytes()[: len(KIND) + 1]
    if found != KIND.encode():
        raise StoreError(f"{folder} holds {found!r}, not {KIND!r}: give a new folder")


def _listed(root: Path) -> Iterator[Path]:
    """Files of every owner that a store wrote or put aside, and files that are being written."""
    folders = [root]
    # whatever is deleted here was written here: links lead elsewhere
    with contextlib.suppress(OSError):
        folders += [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                known = path.suffix in (SEGMENT, REFUSED) and is_hash(path.stem)
                if known or path.suffix == PARTIAL:
                    yield path


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | FLAGS)


def _put_aside(path: Path, file: BinaryIO) -> None:
    """Rename the file that was read, and not one that another process put in its place."""
    aside = path.with_suffix(REFUSED)
    with contextlib.suppress(OSError):
        os.replace(path, aside)
        if os.fstat(file.fileno()).st_ino != aside.lstat().st_ino:
            os.replace(aside, path)


def _unlink(path: Path) -> bool:
    """Delete a file; whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
