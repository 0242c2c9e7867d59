"""Runs that survive: checkpoints of the whole run state through orbax, with a digest of their own.

A checkpoint is one folder ``step_<n>`` that appears complete or not at all. It holds every leaf of
the run state, the history up to there, and a manifest: the leaves' paths, shapes and dtypes, and 64
bits of digest for each, computed on the devices from the values and their positions alone, so that
it can be checked on any number of devices.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import tree
from bilevax._core.peers import Peers
from bilevax.base import PyTree
from bilevax.checkpoint import Checkpointing
from bilevax.run import digest, fingerprint, stored
from bilevax.run.lock import Lock
from bilevax.run.state import Best

FORMAT = 3  # 1 had no fingerprint, and up to 2 the digests of narrow entries were not packed
# names and sizes of a checkpoint's files, written once it is complete
LISTING = "bilevax_files.json"
PATIENCE = 60  # looks, a second apart, until all processes see the same checkpoints
_NAME = re.compile(r"^step_(\d+)$")
# orbax numbers the saves of a process, and two that begin at once wait for each other's signals
_BEGINNING = threading.Lock()


class Store:
    """The checkpoints of one run, in one directory. Every process of a run makes one and calls the
    same methods.
    """

    def __init__(self, spec: Checkpointing, start: int, fingerprint: dict[str, Any], peers: Peers):
        try:
            import orbax.checkpoint as ocp
            from etils import epath
        except ImportError as error:
            raise ImportError(
                "checkpoint= needs orbax; try pip install 'bilevax[checkpoint]'."
            ) from error
        self.spec, self.start, self.fingerprint, self.peers = spec, start, fingerprint, peers
        self.primary = peers.rank == 0
        self._lock: Lock | None = None
        try:
            self.folder = epath.Path(spec.directory)
            exists = self.folder.exists()
        except ImportError as error:
            raise ImportError(
                f"checkpoint: got the directory {spec.directory!r}, whose store needs a package "
                f"({error}); expected one that is installed."
            ) from error
        except KeyError as error:
            raise ValueError(
                f"checkpoint: got the directory {spec.directory!r}, in a kind of store that is not "
                "known; expected a folder, or a url such as 'gs://bucket/run'."
            ) from error
        if exists and not self.folder.is_dir():
            raise NotADirectoryError(
                f"checkpoint: got the directory {spec.directory!r}, which is a file; expected a "
                "folder."
            )
        try:
            if self.primary:
                self._take()
            self._seen_by_all()
            self._writer = ocp.StandardCheckpointer()
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise
        self.differing: list[str] = []  # parts of the problem that are not those of the checkpoint
        self.continued: dict[str, list[str]] | None = None  # what became of each part of its state
        self.place: dict[
            str, np.ndarray
        ] = {}  # what loaders said of theirs, in the checkpoint that was read
        self.batches: dict[str, str] = {}  # digests of their last batches before it, likewise
        # the step of the newest checkpoint, which may still be in the writing
        self.saved: int | None = None
        self.finished: int | None = None  # of the newest one that is whole
        self._unlisted: int | None = None
        self.tol: float | None = None  # that the run in it went by
        self._alike = True  # what was kept there was chosen by the score that this run goes by
        self.seconds = 0.0  # for which saving kept the run waiting

    def _take(self) -> None:
        """Have the folder, made if need be, without what a killed process was writing."""
        place = self.spec.directory
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(place) if "://" not in place else None
            for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
                if not os.path.islink(left):
                    left.rmtree()
        except OSError as error:
            raise type(error)(
                f"checkpoint: got the directory {place!r}, which cannot be made or "
                f"written to ({error}); expected one that can."
            ) from error

    def _seen_by_all(self) -> None:
        """Refuse a folder in which processes see other checkpoints: each would begin elsewhere."""
        for attempt in range(PATIENCE):  # a shared file system may show what is new late
            if attempt:
                time.sleep(1.0)
            seen = self.peers.gather(self.steps() if self.folder.exists() else [])
            if all(steps == seen[0] for steps in seen):
                return
        told = ", ".join(f"process {rank}: {steps}" for rank, steps in enumerate(seen[:8]))
        raise ValueError(
            f"checkpoint: got the directory {self.spec.directory!r}, in which the processes see "
            f"other checkpoints ({told}); expected a folder that all of them see. Try one on a "
            "shared file system."
        )

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first. A link is none: what it points to is
        somebody else's.
        """
        found = [
            _NAME.match(entry.name)
            for entry in self.folder.iterdir()
            if entry.is_dir() and not os.path.islink(entry)
        ]
        return sorted({int(match[1]) for match in found if match})

    def path(self, step: int, prefix: str = "") -> Any:
        """The folder of a checkpoint; one that somebody renamed without the leading zeros is found,
        too.
        """
        place = self.folder / f"{prefix}step_{step:09d}"
        bare = self.folder / f"{prefix}step_{step}"
        return bare if not place.exists() and bare.exists() else place

    # ---- saving

    def save(
        self,
        run: PyTree,
        recovery: dict[Any, Any],
        rows: dict[str, np.ndarray],
        step: int,
        place: dict[str, Any] | None = None,
        batches: dict[str, str] | None = None,
    ) -> None:
        """Begin to write this state, what a failure may go back to, the history by path, the
        loaders' place and digests of the batches they gave last; waits only for the save before.
        """
        begin = time.perf_counter()
        if self._lock is not None:
            self._lock.check()
        self._finish()
        if self.path(step).exists():
            raise FileExistsError(
                f"checkpoint: {self.path(step)} exists already, and a save over it would be lost; "
                "expected a directory that no other run writes to."
            )
        leaves = {
            path: stored.plain(leaf) for path, leaf in stored.flat_state(run, recovery).items()
        }
        if (
            jax.default_backend() == "cpu"
        ):  # there the writer may read the very buffers that the next chunk overwrites
            leaves = {path: tree.copy(leaf) for path, leaf in leaves.items()}
        rows = {path: column.copy() for path, column in rows.items()}
        manifest = {
            "format": FORMAT,
            "start": self.start,
            "fingerprint": self.fingerprint,
            "leaves": {path: stored.describe(leaf) for path, leaf in leaves.items()},
            "digests": digest.of_arrays(list(leaves.values())),
            "history": {path: stored.describe(column) for path, column in rows.items()},
            "history_digest": digest.of_columns(rows),
            "place": {name: mark.tobytes().hex() for name, mark in (place or {}).items()}
            if jax.process_count() == 1
            else {},
            "batches": (batches or {}) if jax.process_count() == 1 else {},
        }
        text = json.dumps(manifest)
        metadata = {
            "manifest": text,
            "digest": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        }
        with _BEGINNING:
            self._writer.save(
                self.path(step), stored.numbered(leaves, rows), custom_metadata=metadata
            )
        self.saved = self._unlisted = step
        self.seconds += time.perf_counter() - begin

    def close(self) -> None:
        """Wait for the save in flight."""
        begin = time.perf_counter()
        try:
            self._finish()
        finally:
            try:
                self._writer.close()
            finally:  # a writer whose save failed may fail again here
                if self._lock is not None:
                    self._lock.release()
                self.seconds += time.perf_counter() - begin

    def renew(self) -> None:
        """Say that this run still writes here."""
        if self._lock is not None:
            self._lock.renew()

    def _finish(self) -> None:
        """Wait for the save in flight, list its files, and remove the oldest checkpoints beyond
        those to keep.
        """
        step, self._unlisted = self._unlisted, None
        try:
            self._writer.wait_until_finished()
            if self.primary and step is not None:
                beside = self.path(step) / f"{LISTING}.tmp"
                beside.write_text(json.dumps(self._files(step)))
                beside.replace(self.path(step) / LISTING)
        except BaseException:
            self.saved = self.finished
            raise
        if step is not None:
            self.finished = step
        if self.primary:
            for old in self.steps()[: -self.spec.keep]:
                self.path(old).rmtree()

    def _files(self, step: int) -> dict[str, int]:
        place, out, todo = self.path(step), {}, [self.path(step)]
        while todo:
            for entry in todo.pop().iterdir():
                if entry.is_dir():
                    todo.append(entry)
                elif not entry.name.startswith(LISTING):
                    out[os.fspath(entry.relative_to(place))] = entry.stat().length
        return dict(sorted(out.items()))

    # ---- reading

    def restore(
        self, run: PyTree, recovery: dict[Any, Any]
    ) -> tuple[PyTree, dict[Any, Any], dict[Any, Any]] | None:
        """The newest sound checkpoint: its state, what a failure may go back to, both placed as
        these are, and its history by path.

        None where there is no checkpoint. One that was saved under another policy has nothing to go
        back to.
        """
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            manifest = found = None
            problem: Exception | None = None
            try:
                manifest = self._manifest(step)
            except Exception as error:
                problem = error
            if manifest is not None:
                self._same_problem(run, manifest, step)
                try:
                    found = self._read(run, recovery, manifest, step)
                except (
                    Exception
                ) as error:  # whatever the reader trips over: the file is not what was written
                    problem = error
            if all(self.peers.gather(found is not None)):
                assert found is not None
                if self.primary:
                    for bad in damaged:
                        self.path(bad).rename(self._aside(bad))
                self.peers.gather("restored")
                self.saved = self.finished = step
                said = {} if manifest is None else manifest.get("place", {})
                self.batches = {} if manifest is None else manifest.get("batches", {})
                self.place = {
                    name: np.frombuffer(bytes.fromhex(mark), np.uint8)
                    for name, mark in said.items()
                }
                return found
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
            warnings.warn(
                f"checkpoint: {self.path(step)} is damaged ({reason}); going back to the one "
                f"before it. It is kept as {self._aside(step).name}.",
                RuntimeWarning,
                stacklevel=5,
            )
            damaged.append(step)
        if damaged:
            raise RuntimeError(
                f"checkpoint: all of {[str(self.path(s)) for s in damaged]} are damaged. Move the "
                "directory away to start anew, or put a backup back."
            )
        return None

    def asked_for_more(self, tol: float | None) -> bool:
        """Whether the run that was read may have ended at a tolerance that is none for this one."""
        return self.tol is not None and (tol is None or tol < self.tol)

    def _aside(self, step: int) -> Any:
        place, number = self.path(step, "damaged_"), 1
        while place.exists():
            place, number = self.folder / f"damaged_step_{step:09d}_{number}", number + 1
        return place

    def _manifest(self, step: int) -> dict[Any, Any]:
        """The manifest of a checkpoint whose files are all there."""
        metadata = self._writer.metadata(self.path(step)).custom_metadata
        if not metadata or "manifest" not in metadata:
            raise stored.Damaged("it has no manifest")
        text = metadata["manifest"]
        if hashlib.blake2b(text.encode(), digest_size=16).hexdigest() != metadata.get("digest"):
            raise stored.Damaged("its manifest does not have the manifest's digest")
        was, now = self._listing(step), self._files(step)
        if was is not None and was != now:
            raise stored.Damaged(
                "files are missing or have another size: "
                f"{sorted(dict(was.items() ^ now.items()))[:5]}"
            )
        return json.loads(text)

    def _listing(self, step: int) -> dict[Any, Any] | None:
        """The listing of a checkpoint; None where there is none that is whole, since the digests
        find what is damaged without it.
        """
        listing = self.path(step) / LISTING
        try:
            found = json.loads(listing.read_text()) if listing.exists() else None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _same_problem(self, run: PyTree, manifest: dict[Any, Any], step: int) -> None:
        """Refuse a checkpoint of another problem, by what differs; or note what differs, where the
        run is to go on all the same.
        """
        if manifest["format"] > FORMAT:
            raise ValueError(
                f"checkpoint: {self.path(step)} was written by a later version of bilevax, in "
                f"format {manifest['format']}; "
                f"expected {FORMAT} or older. Update bilevax."
            )
        if manifest["start"] != self.start:
            raise ValueError(
                f"checkpoint: {self.path(step)} belongs to a run that started at step "
                f"{manifest['start']}, and this one starts at {self.start}; "
                "expected a directory for each call of its own."
            )
        want = {
            path: stored.describe(stored.plain(leaf)) for path, leaf in stored.flat(run).items()
        }
        got = {
            path: text
            for path, text in manifest["leaves"].items()
            if not path.startswith(stored.RECOVERY)
        }
        paths = [
            f"{path} ({got.get(path, 'absent')} there, {want.get(path, 'absent')} here)"
            for path in {**want, **got}
            if want.get(path) != got.get(path)
            and stored.part(path) != ".best"  # whether one is kept is this call's to say
        ]
        saved = manifest.get("fingerprint")
        self.tol = (saved or {}).get("tol")
        score = (saved or {}).get("score", self.fingerprint["score"])
        self._alike = score == self.fingerprint["score"]
        if not self._alike and any(stored.part(path) == ".best" for path in want.keys() & got):
            warnings.warn(
                f"checkpoint: {self.path(step)} kept its iterate by another score than this run "
                "does (metrics, select or mode differ); it is forgotten, and one is chosen anew "
                "from here on.",
                RuntimeWarning,
                stacklevel=6,
            )
        if saved is None or saved["versions"] != self.fingerprint["versions"]:
            theirs = (
                "a version of bilevax that kept no fingerprint"
                if saved is None
                else f"other versions ({saved['versions']})"
            )
            warnings.warn(
                f"checkpoint: {self.path(step)} was written by {theirs}; whether its functions are "
                "those of this problem cannot be told.",
                RuntimeWarning,
                stacklevel=6,
            )
        parts = {} if saved is None else fingerprint.differing(saved, self.fingerprint)
        self.differing = [*parts, *(["the state's structure"] if paths else [])]
        lost = sorted(
            {stored.part(path) for path in {**want, **got} if want.get(path) != got.get(path)}
            & set(_PARAMETERS)
        )
        if not self.differing or (self.spec.resume == "continue" and not lost):
            return
        if self.spec.resume == "continue":
            raise ValueError(
                f"checkpoint: the parameters {lost} of {self.path(step)} have another structure or "
                "other shapes than those of this problem, so there "
                "is nothing to go on from; expected the same. Give this run a directory of its own."
            )
        more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
        what = "".join(f" {name}{words}," for name, words in parts.items())[:-1]
        raise ValueError(
            f"checkpoint: {self.path(step)} belongs to another problem; expected this "
            f"one's.{f' What differs:{what}.' if what else ''}"
            f"{f' Differing paths: {chr(44).join(paths[:8])}{more}.' if paths else ''} Give this "
            "run a directory of its own, or go on from those "
            "parameters by checkpoint.every(..., resume='continue')."
        )

    def _read(
        self, run: PyTree, recovery: dict[Any, Any], manifest: dict[Any, Any], step: int
    ) -> tuple[PyTree, dict[Any, Any], dict[Any, Any]]:
        wanted = {
            path: stored.plain(leaf) for path, leaf in stored.flat_state(run, recovery).items()
        }
        saved = manifest["leaves"]
        others = [
            text for path, text in saved.items() if not stored.describes(wanted.get(path), text)
        ]
        self._bound([*others, *manifest["history"].values()], step)
        like = {
            path: stored.place(wanted[path])
            if stored.describes(wanted.get(path), text)
            else stored.empty(text)
            for path, text in saved.items()
        }
        columns = {path: stored.empty(text) for path, text in manifest["history"].items()}
        restored = self._writer.restore(self.path(step), stored.numbered(like, columns))
        leaves = {
            path: restored.get(f"s{i}", wanted.get(path)) for i, path in enumerate(like)
        }  # an array without entries is not written
        digests = digest.of_arrays(list(leaves.values()), packed=manifest["format"] > 2)
        if digests != manifest["digests"]:
            pairs = zip(digests, manifest["digests"], strict=True)
            wrong = sorted({list(leaves)[i // 2] for i, (a, b) in enumerate(pairs) if a != b})
            raise stored.Damaged(f"the digest differs at {wrong[:5]}")
        rows = {
            path: np.asarray(restored.get(f"h{i}", column))
            for i, (path, column) in enumerate(columns.items())
        }
        if digest.of_columns(rows) != manifest["history_digest"]:
            raise stored.Damaged("the digest of the history differs")
        same = all(
            stored.describes(wanted.get(path), text) for path, text in saved.items()
        ) and len(saved) == len(wanted)
        if self.differing:
            return self._continued(run, leaves, saved), {}, rows
        own = {path: leaf for path, leaf in wanted.items() if stored.part(path) == ".best"}
        kept = all(stored.describes(leaf, saved.get(path, "")) for path, leaf in own.items())
        kept = kept and self._alike
        out = stored.filled(run, leaves if kept else {**leaves, **own})
        return (
            out if kept else _kept_anew(out),
            stored.filled(recovery, leaves, stored.RECOVERY) if same else {},
            rows,
        )

    def _bound(self, texts: list[str], step: int) -> None:
        """Refuse what claims more memory than its files can hold: a file of zeros packs a few
        thousand times at most.
        """
        claimed, held = sum(stored.size(text) for text in texts), sum(self._files(step).values())
        if claimed > 2**24 + 4096 * held:
            raise stored.Damaged(f"it claims {claimed} bytes in {held} bytes of files")

    def _continued(self, run: PyTree, leaves: dict[str, Any], saved: dict[str, str]) -> PyTree:
        """The state of another problem, as far as its parts have the structure of this one's; the
        rest as in `run`.
        """
        wanted = {
            path: stored.describe(stored.plain(leaf)) for path, leaf in stored.flat(run).items()
        }
        parts: dict[str, list[str]] = {}
        for path in {**wanted, **saved}:
            if not path.startswith(stored.RECOVERY):
                parts.setdefault(stored.part(path), []).append(path)
        same = [
            part
            for part, paths in parts.items()
            if all(wanted.get(path) == saved.get(path) for path in paths)
        ]
        taken = [part for part in same if part not in _ANEW]
        self.continued = {
            "differs": self.differing,
            "taken": taken,
            "begun anew": [part for part in parts if part not in taken],
        }
        logging.getLogger("bilevax").warning(
            "checkpoint: goes on from another problem: %s", self.continued
        )
        mixed = {
            path: leaves[path] if stored.part(path) in taken else stored.plain(leaf)
            for path, leaf in stored.flat(run).items()
        }
        return _kept_anew(stored.filled(run, mixed))


# ---- what is in a checkpoint

_PARAMETERS = (".algorithm.inner.params", ".algorithm.outer")
_ANEW = (".key", ".code", ".first_norm", ".best")  # of another problem, or decided by this call


def _kept_anew(run: PyTree) -> PyTree:
    """`run` with the point where it stands as its kept iterate, to be replaced by the first that is
    scored.
    """
    if run.best is None:
        return run
    point, worst = run.algorithm, jnp.full_like(run.best.score, jnp.inf)
    return run._replace(
        best=Best(worst, *tree.copy((run.step, point.inner.params, point.inner.model, point.outer)))
    )
