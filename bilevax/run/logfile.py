"""Files of rows that outlive the run that writes them: read although their end was cut off,
replaced whole or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

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


class Form(NamedTuple):
    """A kind of log.

    Attributes:
      begin, end: of every row, before the number of its step and behind all it holds.
      header: whether a line with the names of columns stands above the rows.
      whole: whether a text of so many rows, counted by ``count(sign)`` behind the header, holds
        nothing else, as far as counting tells.
      read: reads it row by row.
    """

    begin: bytes
    end: bytes
    header: bool
    whole: Callable[[bytes, int, Callable[[str], int]], bool]
    read: Callable[[Path], Rows]

    def table(self, data: bytes) -> int:
        """Where the rows begin."""
        return data.find(b"\n") + 1 if self.header else 0


def _whole_objects(data: bytes, rows: int, count: Callable[[str], int]) -> bool:
    return data.startswith(JSONL.begin) and count("{") == count("}") == rows


def _whole_table(data: bytes, rows: int, count: Callable[[str], int]) -> bool:
    odd = any(sign in data for sign in (b'"', b"\0", b"\r"))
    names = data[: CSV.table(data)].count(b",")
    return data.startswith(b"step,") and not odd and count(",") == rows * names


JSONL = Form(b'{"step": ', b"}\n", False, _whole_objects, read_jsonl)
CSV = Form(b"", b"\n", True, _whole_table, read_csv)


class Kept(NamedTuple):
    """What stays of a log: its text, the header of a table, whether that is all that the file
    holds, and the cut end.
    """

    text: bytes
    header: list[str]
    whole: bool
    cut: str | None


def kept(path: Path, form: Form, step: int) -> Kept:
    """What stays of a log for a run that writes the steps from `step` on.

    The log of a run, whose steps follow one another, is told by counting its lines: a long one is
    not read row by row.
    """
    data = path.read_bytes()
    head = form.table(data)
    steps = _consecutive(data, form)
    if steps is not None:
        row = len(data)
        if steps.start < step < steps.stop:
            row = data.find(b"\n" + form.begin + b"%d," % step, max(head - 1, 0)) + 1
        if row:
            end = 0 if step <= steps.start else row
            header = data[: head - 1].decode().split(",") if head and end else []
            return Kept(data[:end], header, end == len(data), None)
    found = form.read(path)
    lines = [line for number, line, _ in found.rows if number is None or number < step]
    header = found.header if lines else []
    text = as_text([csv_line(header), *lines] if header else lines)
    return Kept(text, header, text == data, found.cut)


def refuse_foreign(path: Path, form: Form) -> None:
    """Raise where a file is no log."""
    if _consecutive(path.read_bytes(), form) is None:
        form.read(path)


def _consecutive(data: bytes, form: Form) -> range | None:
    """The steps of a log of whole rows that follow one another: by its first and last row, and the
    number of lines, of their beginnings and of their ends.
    """

    def step(at: int) -> int:
        at += len(form.begin)
        digits = data[at : at + 20].partition(b",")[0]
        return int(digits) if digits.isdigit() else -1

    if not data.endswith(form.end):
        return None
    head = form.table(data)
    signs = np.frombuffer(data, np.uint8)[head:]  # counts many times faster than bytes do
    count = lambda sign: int(np.count_nonzero(signs == ord(sign)))
    rows, last = count("\n"), data.rfind(b"\n", head, -1) + 1 or head
    if not rows or step(head) < 0 or step(last) < 0:
        return None
    steps = range(step(head), step(last) + 1)
    return steps if len(steps) == rows and form.whole(data, rows, count) else None


def as_text(lines: list[str]) -> bytes:
    """Lines as a file has them."""
    return "".join(line + "\n" for line in lines).encode()


def csv_line(cells: list[Any]) -> str:
    """A row of a CSV file, without the end of its line."""
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells)
    return out.getvalue()


def replace(path: Path, text: bytes) -> None:
    """Write a file anew: the old one stays until the new one is complete."""
    path = Path(os.path.realpath(path))  # a link stays one
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(text)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


_WRITTEN: set[str] = set()  # files that this process adds rows to
_CLAIMING = threading.Lock()  # two runs in threads may want one


def claim(path: Path) -> Callable[[], None]:
    """Have a file for oneself, until what is returned is called; refused where another log has
    it.
    """
    place = os.path.realpath(path)
    if path.exists() and not path.is_file():  # a pipe or a device, which may be shared
        return lambda: None
    with _CLAIMING:
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
