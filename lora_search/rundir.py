"""The run directory: where each file of a sweep lies. Knows paths, and nothing of what is in them."""

from __future__ import annotations

import atexit
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from lora_search.errors import InputError
from lora_search.lease import LEASE, is_leased, leased
from lora_search.spec.secret import refuse_secret
from lora_search.spec.yaml import read_yaml
from lora_search.storage import Folder, StoreError, is_uri

SWEEP_FILE = "sweep.yaml"

PROVENANCE = "provenance.json"

RECORDS = (SWEEP_FILE, PROVENANCE, "trials.jsonl", "study.journal")
"""The small files of a run directory."""

REPORT = "report.html"

LOCK = ".lock"

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
"""What file systems say that lock no files."""

MOUNTS = Path("/proc/self/mountinfo")

LOCAL_LOCKS = {"nolock", "local_lock=flock", "local_lock=all", "localflock", "localflocks"}
"""What NFS, Lustre and OCFS2 are mounted with where a lock keeps out none but the processes of the same machine."""

PATIENCE_S = 0.5
"""How long the lock is waited for: who only looks whether it is held takes it for a moment."""


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one sweep."""

    path: Path
    uri: str | None = None
    """Of the run directory in an object store, whose small files have a copy in `path`; checkpoints do not."""

    @property
    def folder(self) -> Folder:
        """What all nodes see."""
        return Folder(self.uri or self.path.resolve())

    @property
    def place(self) -> str:
        """As it is told to the user."""
        return self.uri or str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def spec(self) -> Path:
        """The resolved sweep file."""
        return self.path / SWEEP_FILE

    @property
    def provenance(self) -> Path:
        return self.path / PROVENANCE

    @property
    def trials(self) -> Path:
        """One line a trial and report."""
        return self.path / "trials.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the process that writes to the run directory."""
        return self.path / LOCK

    @property
    def tune(self) -> Path:
        """Ray Tune's state, and the trials' checkpoints."""
        return self.path / "tune"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.path / REPORT


def create_run(output: str | Path, name: str, *, exact: bool) -> RunDirectory:
    """A new run directory `output/name`; where that is taken, `name-2`, `name-3`, ...

    Raises:
        InputError: `exact` and the name is taken, or the folder cannot be made.
    """
    if is_uri(output):
        return _create_in_store(str(output), name, exact)
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = output / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                return RunDirectory(path)
            except FileExistsError:
                if exact and _is_unused(Folder(path)):
                    return RunDirectory(path)
                if exact:
                    raise InputError(f"--name {name}: {path} exists already; choose another name") from None
                number += 1
    except OSError as error:
        raise InputError(f"output: cannot make a run directory in {output}: {error}") from None


def _create_in_store(output: str, name: str, exact: bool) -> RunDirectory:
    folder = Folder(output, patience_s=0)
    try:
        folder.check()
        taken = folder.names()
    except (OSError, ValueError) as error:
        raise InputError(f"output: found {output!r}, which cannot be written to: {error}") from None
    if exact and name in taken and not _is_unused(folder.below(name)):
        raise InputError(f"--name {name}: {folder.below(name).place} exists already; choose another name")
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return _stored_run(folder.below(name if exact else next(name for name in names if name not in taken)))


def _is_unused(folder: Folder) -> bool:
    """Whether there is nothing yet but a lock: whoever took the name was ended before the sweep had begun."""
    return set(folder.names()) <= {LOCK, LEASE}


def refuse_begun(run: RunDirectory) -> None:
    """
    Raises:
        InputError: two processes took the same unused name at once, and one has ended since, and left its sweep there.
    """
    if not _is_unused(run.folder):
        raise InputError(f"{run.place}: another lora-search run has begun in it meanwhile; choose another name")


def discard(run: RunDirectory) -> None:
    """Remove a run directory with all that it holds."""
    run.folder.remove_all()
    if run.uri is not None:
        shutil.rmtree(run.path.parent)  # of the copy here


def newest_run(output: str | Path, name: str, *, exact: bool = False) -> RunDirectory | None:
    """The latest of a sweep's run directories `name`, `name-2`, `name-3`, ...; None where there is none.

    Args:
        exact: only that of this very name.

    Raises:
        InputError: the object store cannot be read.
    """
    return _newest(output, name, exact, lambda folder: True)


def newest_run_of_job(output: str | Path, name: str, job: str, *, exact: bool = False) -> RunDirectory | None:
    """The latest of them that a scheduler's job has begun, and no other has resumed since, or that it resumed last.

    Raises:
        InputError: the object store cannot be read.
    """
    return _newest(output, name, exact, lambda folder: _job(folder) == job)


def _newest(output: str | Path, name: str, exact: bool, wanted: Callable[[Folder], bool]) -> RunDirectory | None:
    folder = Folder(output, patience_s=0)
    try:
        numbered = {
            int(found.removeprefix(name).removeprefix("-") or 1): found
            for found in folder.names()
            if re.fullmatch(re.escape(name) + ("" if exact else r"(-\d+)?"), found)
            and SWEEP_FILE in folder.below(found).names()
            and (found == name or _sweep_name(folder.below(found)) == name)
        }
        latest_first = (numbered[number] for number in sorted(numbered, reverse=True))
        newest = next((found for found in latest_first if wanted(folder.below(found))), None)
    except (OSError, ValueError) as error:
        raise InputError(f"output: found {str(output)!r}, which cannot be read: {error}") from None
    if newest is None:
        return None
    return _stored_run(folder.below(newest)) if is_uri(output) else RunDirectory(Path(output) / newest)


def _job(folder: Folder) -> str | None:
    """The scheduler's job that has begun or resumed a run last; None where there was none, or nobody can tell."""
    try:
        return _fact(folder.read(PROVENANCE), "job")
    except StoreError:
        raise
    except OSError:
        return None


def _sweep_name(folder: Folder) -> object:
    """What a run directory's sweep is called: `llama-7` may be a sweep of its own, or the seventh run of `llama`."""
    try:
        found = read_yaml(folder.read(SWEEP_FILE).decode(), folder.place)
    except (yaml.YAMLError, ValueError, OverflowError, InputError):  # somebody else's
        return None
    return found.get("name") if isinstance(found, dict) else None


def _stored_run(folder: Folder) -> RunDirectory:
    """A run directory in an object store, with an empty folder for its copy here."""
    name = folder.place.partition("?")[0].rstrip("/").rpartition("/")[2]
    path = Path(tempfile.mkdtemp(prefix="lora-search-")) / name
    path.mkdir()
    return RunDirectory(path, folder.place)


def fetch(run: RunDirectory) -> None:
    """Copy the small files of a run directory in an object store to `run.path`, those that are there.

    Raises:
        StoreError: the store fails.
    """
    found = {name: run.folder.read(name) for name in RECORDS if name in run.folder.names()}
    for name, content in found.items():
        (run.path / name).write_bytes(content)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that, whatever happens meanwhile, it has its old content or all of the new.

    Raises:
        OSError: there is no room, or no right to write; the old content is still there.
    """
    Folder(file.parent).write(file.name, content.encode() if isinstance(content, str) else content)


def run_identity(folder: Path) -> str | None:
    """What no other run directory is called, wherever it is moved; None where it has no provenance."""
    try:
        return _fact((folder / PROVENANCE).read_bytes(), "id")
    except OSError:
        return None


def _fact(provenance: bytes, key: str) -> str | None:
    """A text in a provenance.json, which may be somebody else's; None where there is none."""
    try:
        found = json.loads(provenance).get(key)
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


@contextmanager
def locked(run: RunDirectory) -> Iterator[Callable[[], bool]]:
    """Keep other processes from writing to a run directory; a function that says whether they still are kept.

    Raises:
        InputError: another one does; or one that took the same name has removed it.
    """
    if run.uri is None and not run.path.is_dir():
        raise InputError(f"{run.path}: another lora-search run has removed it, which found its input wrong")
    if run.uri is not None or not _can_be_locked(run.lock):
        with leased(Folder(run.folder.place, patience_s=0)) as held:
            yield held
        return
    lock = FileLock(run.lock)
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        raise InputError(f"{run.path}: another lora-search run is writing to it") from None
    try:
        yield lambda: True
    finally:
        lock.release()


def _can_be_locked(file: Path) -> bool:
    """Whether its file system locks files: a cluster's may not, as Lustre without `-o flock` and NFS without lockd.

    Or against processes of the same machine alone.
    """
    if _locks_here_alone(file.parent):
        return False
    opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    finally:
        os.close(opened)
    return True


def _locks_here_alone(folder: Path) -> bool:
    """Whether a lock on a file there keeps out no process of another machine, by how its file system is mounted."""
    try:
        device = folder.stat().st_dev
        mounts = [line.split() for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:  # it is not there, or this is no Linux
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(number == mount[2] and not LOCAL_LOCKS.isdisjoint(mount[-1].split(",")) for mount in mounts)


def is_locked(run: RunDirectory) -> bool:
    """Whether a process writes to the run directory now; of one in an object store, that takes seconds to see."""
    if run.uri is not None or _locks_here_alone(run.path):
        return is_leased(run.folder)
    try:
        file = os.open(run.lock, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # nobody has written yet; or it is somebody else's, of whom we may not know
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return is_leased(run.folder)
    finally:
        os.close(file)
    return False


def find_run(run: str, output: Path = Path("runs")) -> RunDirectory:
    """The run directory at a path or URI, or of that name under the output folder.

    Of one in an object store, the small files are copied into a folder that lasts as long as this process.

    Raises:
        InputError: there is none.
    """
    if is_uri(run):
        return _find_in_store(run)
    try:
        for path in (at_home(run), output / run):
            if (path / SWEEP_FILE).is_file():
                return RunDirectory(path)
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise InputError(f"RUN: found {run[:80]!r}, which cannot be read: {error.strerror or error}") from None
    known = sorted(path.parent.name for path in output.glob(f"*/{SWEEP_FILE}"))
    there = f"{output} has {', '.join(known)}" if known else f"{output} has no runs"
    raise InputError(f"RUN: found {run!r}, which is neither a run directory nor the name of one; {there}")


def at_home(path: str) -> Path:
    """A path whose `~` or `~user` is the home, where there is such a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _find_in_store(uri: str) -> RunDirectory:
    refuse_secret("RUN", uri)
    folder = Folder(uri, patience_s=0)
    try:
        if SWEEP_FILE not in folder.names():
            raise InputError(f"RUN: found {uri!r}, where there is no run directory: it has no {SWEEP_FILE}")
        run = _stored_run(folder)
        atexit.register(shutil.rmtree, run.path.parent, ignore_errors=True)
        fetch(run)
    except (OSError, ValueError) as error:
        raise InputError(f"RUN: found {uri!r}, which cannot be read: {error}") from None
    return run
