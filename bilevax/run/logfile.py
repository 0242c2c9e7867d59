"""Files of rows that outlive the run that writes them: read although their end was cut off,
replaced whole or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

try:
    import fcntl
except ImportError:  # not on this system: a log is kept from other threads alone
    fcntl = None  # type: ignore[assignment]


class Rows(NamedTuple):
    """A log as it is read: whole rows (their step, their line, what they hold), a header, and the
    cut end.
    """

    rows: list[tuple[int | None, str, Any]]
    header: list[str]
    cut: str | None


def _lines(path: Path) -> tuple[list[str], bool]:
    """Lines that hold something, and whether the last of them ends as a line does."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip("\r\0 ")], text.endswith(
        "\n"
    )


def _foreign(path: Path, number: int, line: str, wrote: str) -> ValueError:
    return ValueError(
        f"path: got {os.fspath(path)!r}, whose line {number} ({line[:40]!r}) is no row of a log; "
        f"expected a file that {wrote} wrote. Give another file name."
    )


def read_jsonl(path: Path) -> Rows:
    """The rows of a JSONL log. A last line that was cut off is left out; any other that is no row
    is an error.
    """
    rows: list[tuple[int | None, str, Any]] = []
    lines, _ = _lines(path)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append((int(row["step"]) if "step" in row else None, line, dict(row)))
        except (ValueError, TypeError):
            if number < len(lines) or (number == 1 and not line.startswith("{")):
                raise _foreign(path, number, line, "callbacks.jsonl") from None
            return Rows(rows, [], line)
    return Rows(rows, [], None)


def read_csv(path: Path) -> Rows:
    """The rows of a CSV log: likewise; without the end of its line, a last row may lack digits of
    its last number.
    """
    rows: list[tuple[int | None, str, Any]] = []
    lines, whole = _lines(path)
    if not lines or (len(lines) == 1 and not whole):  # not even a whole header
        return Rows([], [], lines[0] if lines else None)
    header, *table = (next(csv.reader([line])) for line in lines)
    if header[0] != "step":
        raise _foreign(path, 1, lines[0], "callbacks.csv")
    for number, (line, cells) in enumerate(zip(lines[1:], table, strict=True), 2):
        last = number == len(lines)
        if last and not whole:
            return Rows(rows, header, line)
        try:
            if len(cells) != len(header):
                raise ValueError
            rows.append((int(cells[0]), line, dict(zip(header, cells, strict=True))))
        except ValueError:
            if not last:
                raise _foreign(path, number, line, "callbacks.csv") from None
            return Rows(rows, header, line)
    return Rows(rows, header, None)


def replace(path: Path, lines: Iterable[str]) -> None:
    """Write a file anew: the old one stays until the new one is complete."""
    path = Path(os.path.realpath(path))  # a link stays one
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.writelines(line + "\n" for line in lines)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


_WRITTEN: set[str] = set()  # files that this process adds rows to


def claim(path: Path) -> Callable[[], None]:
    """Have a file for oneself, until what is returned is called; refused where another log has
    it.
    """
    place = os.path.realpath(path)
    if path.exists() and not path.is_file():  # a pipe or a device, which may be shared
        return lambda: None
    if place in _WRITTEN:
        raise _taken(path)
    if path.is_file():
        append(path).close()
    _WRITTEN.add(place)
    return lambda: _WRITTEN.discard(place)


def append(path: Path) -> TextIO:
    """A file to add rows to; refused where another process does so."""
    file = path.open("a", encoding="utf-8", newline="")
    if fcntl is not None and path.is_file():
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise _taken(path) from None
        except OSError:  # a file system without locks
            pass
    return file


def still_there(path: Path, file: TextIO) -> bool:
    """Whether what is written to `file` is found under its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _taken(path: Path) -> RuntimeError:
    return RuntimeError(
        f"path: {os.fspath(path)!r} is written to by another log, of a run that has not ended; "
        "expected a file of one log alone. Give another file name."
    )
