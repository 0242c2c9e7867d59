"""One writer to a folder at a time: a file that says who, renewed while the run goes on."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

NAME = "bilevax_lock.json"
RENEW, STALE = (
    10.0,
    60.0,
    # seconds between two signs of life, and without one after which a writer elsewhere counts as
    # gone
)


class Lock:
    """Held from `__init__` to `release`. Raises RuntimeError where another writer has the
    folder.
    """

    def __init__(self, folder: os.PathLike[str] | str):
        self.path = Path(folder) / NAME
        self.me = {
            **_place(),
            "pid": os.getpid(),
            "began": _began(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        self._renewed = time.monotonic()
        try:
            self._folder: int | None = os.open(folder, os.O_RDONLY)
        except OSError:  # a system that opens no folders
            self._folder = None
        try:
            self._take()
        except BaseException:
            if self._folder is not None:
                os.close(self._folder)
            raise

    def _take(self) -> None:
        try:
            with self.path.open("x") as file:
                json.dump(self.me, file)
            return
        except FileExistsError:
            pass
        except OSError:  # a full disk: half a lock would keep others out
            self.path.unlink(missing_ok=True)
            raise
        holder = self._read()
        if self._lives(holder):
            raise RuntimeError(
                f"checkpoint: the directory {str(self.path.parent)!r} is written to by "
                f"{_name(holder)}; expected one that no other run writes to. "
                "Wait for that run, end it, or give this one a directory of its own."
            )
        if holder and not self._here(holder):
            warnings.warn(
                f"checkpoint: {_name(holder)} has not written to {str(self.path.parent)!r} for "
                f"{STALE:.0f} s, and "
                "counts as gone; this run takes over.",
                RuntimeWarning,
                stacklevel=6,
            )
        self._write()
        time.sleep(0.2)  # of several that take over at once, the last one has it
        self.check()

    def check(self) -> None:
        """Raise where somebody else has taken the folder, or where it is gone."""
        if not self.path.exists():
            what = "has lost the lock of this run" if self.path.parent.is_dir() else "is gone"
            raise FileNotFoundError(
                f"checkpoint: the directory {str(self.path.parent)!r} {what}; expected nobody to "
                "touch it while a run writes there. "
                "Nothing more is saved here."
            )
        holder = self._read()
        if holder.get("token") != self.me["token"]:
            raise RuntimeError(
                f"checkpoint: the directory {str(self.path.parent)!r} was taken over by "
                f"{_name(holder)} while this run "
                "wrote to it; expected to be its only writer. Nothing more is saved here."
            )

    def renew(self) -> None:
        """A sign of life, where one is due."""
        if time.monotonic() - self._renewed > RENEW:
            self.check()
            os.utime(self.path)
            self._renewed = time.monotonic()

    def release(self) -> None:
        """Let others write, also where the folder was renamed meanwhile."""
        try:
            self._unlock()
        finally:
            if self._folder is not None:
                os.close(self._folder)
                self._folder = None

    def _unlock(self) -> None:
        if self._read().get("token") == self.me["token"]:
            self.path.unlink(missing_ok=True)
        elif self._folder is not None:
            try:
                here = os.open(NAME, os.O_RDONLY, dir_fd=self._folder)
                with open(here) as file:
                    mine = json.load(file).get("token") == self.me["token"]
                if mine:
                    os.unlink(NAME, dir_fd=self._folder)
            except (OSError, ValueError, AttributeError):  # not there, or another's
                return

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        beside = self.path.with_name(f"{NAME}.{self.me['token']}")
        beside.write_text(json.dumps(self.me))
        os.replace(beside, self.path)

    def _here(self, holder: dict[Any, Any]) -> bool:
        return all(holder.get(name) == value for name, value in _place().items())

    def _lives(self, holder: dict[Any, Any]) -> bool:
        """Whether the holder still runs: here by its number, elsewhere by its last sign of life on
        the file system's own clock.
        """
        if self._here(holder):
            pid = holder.get("pid")
            return (
                isinstance(pid, int)
                and _began(pid) is not None
                and _began(pid) == holder.get("began")
            )
        now = self.path.with_name(f"{NAME}.{self.me['token']}")
        try:
            now.write_text("")
            return now.stat().st_mtime - self.path.stat().st_mtime < STALE
        except FileNotFoundError:  # let go in between
            return False
        finally:
            now.unlink(missing_ok=True)


def _place() -> dict[str, str]:
    """This machine since it was started, and the process numbers that are seen in it."""

    def read(path: str) -> str:
        try:
            return Path(path).read_text().strip()
        except OSError:
            return ""

    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return {
        "host": socket.gethostname(),
        "boot": read("/proc/sys/kernel/random/boot_id"),
        "space": space,
    }


def _began(pid: int) -> str | None:
    """When a process began, None where there is none: numbers are given again."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's, but there
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown"
    return None if stat[0] == "Z" else stat[19]


def _name(holder: dict[Any, Any]) -> str:
    if not holder:
        return "another run"
    return f"process {holder.get('pid')} on {holder.get('host')!r}"
