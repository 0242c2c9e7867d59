"""Disks that are full, folders that are read-only or gone: ``python -m
tests.campaigns.run_faults``.

A run with checkpoints and two logs meets each fault at its twentieth step: files that may grow no
further than to each of several sizes (so that each kind of write is the first to fail once), a
folder that nobody may write to any more, one that is deleted, one that becomes a file. Each run
must end within a minute, as a run that is saved or by an error that names the cause and carries the
run; and what is started again afterwards must end with the bits of the undisturbed run. The last
line is the summary.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import signal
import tempfile
import time

import jax
import numpy as np

import bilevax as bx
from tests.campaigns.run_kills import Life
from tests.run.checkpoint_problem import bits, solve

STEPS, EVERY, AT = 61, 10, 20
SIZES = (0, 100, 1000, 3000, 6000, 12000)
FAULTS = (*(f"full at {size}" for size in SIZES), "read-only", "deleted", "a file")
CAUSES = (
    "File too large",
    "Permission denied",
    "Read-only",
    "No such file",
    "File exists",
    "Not a directory",
    "a file; expected",
    "lost the lock",  # the folder was deleted, and made again by a save that was in the writing
    "is gone",
    "exists",
    "NOT_FOUND",
)


def meddle(fault: str, folder: pathlib.Path):
    def fn(event):
        if event.step != AT:
            return
        if fault.startswith("full"):
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (int(fault.split()[-1]), resource.RLIM_INFINITY)
            )
        elif fault == "read-only":
            folder.chmod(0o500)
        else:
            folder.rename(folder.with_name("gone"))  # at once, while a save is written into it
            if fault == "a file":
                folder.write_text("")
            shutil.rmtree(folder.with_name("gone"), ignore_errors=True)

    return bx.callbacks.every(AT, fn)


def run(folder: pathlib.Path, *callbacks, **keywords):
    logs = [
        bx.callbacks.jsonl(folder / "log.jsonl", flush_every=5),
        bx.callbacks.csv(folder / "log.csv", flush_every=5),
    ]
    return solve(
        STEPS,
        checkpoint=bx.checkpoint.every(EVERY, folder / "saved"),
        callbacks=[*logs, *callbacks],
        **keywords,
    )


def work(fault: str, folder: pathlib.Path) -> None:
    """What became of one run, as ``outcome.json`` beside its folder."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if os.geteuid() == 0:  # whom no permission stops
        os.setgid(65534)
        os.setuid(65534)
    found: dict = {"error": "", "steps": None}
    try:
        found["steps"] = run(folder, meddle(fault, folder / "saved")).stats["steps"]
    except Exception as error:
        words = [
            str(error),
            *(str(cause) for cause in (error.__cause__, error.__context__) if cause is not None),
            *getattr(error, "__notes__", []),
        ]
        solution = getattr(error, "solution", None)
        found = {
            "error": f"{type(error).__name__}: {' '.join(' '.join(words).split())}",
            "steps": solution and solution.stats["steps"],
        }
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    folder.with_suffix(".json").write_text(json.dumps(found))


def again(folder: pathlib.Path) -> None:
    """The run that is started after the fault is mended."""
    np.savez(folder.with_suffix(".npz"), **bits(run(folder)))


def same(one: pathlib.Path, other: pathlib.Path) -> bool:
    with np.load(one) as a, np.load(other) as b:
        return set(a) == set(b) and all(a[name].tobytes() == b[name].tobytes() for name in a)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    # before the forks, and before the rights to read them are given up
    import grp  # noqa: F401
    import pwd  # noqa: F401

    import orbax.checkpoint  # noqa: F401

    bad = 0
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o777)
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", f"{top}/compiled")
        whole = pathlib.Path(top) / "whole"
        whole.mkdir()
        if Life(again, whole).wait() != 0:
            raise RuntimeError((whole / "words").read_text()[-2000:])
        for number, fault in enumerate(FAULTS):
            folder = pathlib.Path(top) / f"run{number}"
            folder.mkdir()
            folder.chmod(0o777)
            begin = time.monotonic()
            status = Life(lambda folder, fault=fault: work(fault, folder), folder).wait(60)
            took, report = time.monotonic() - begin, folder.with_suffix(".json")
            found = (
                json.loads(report.read_text())
                if report.exists()
                else {"error": f"ended with {status}", "steps": None}
            )
            if (folder / "saved").is_file():
                (folder / "saved").unlink()
            if (folder / "saved").exists():
                (folder / "saved").chmod(0o700)
            saved = found["error"] == "" and found["steps"] == STEPS
            told = (
                found["steps"] is not None
                and found["steps"] >= AT
                and any(cause in found["error"] for cause in CAUSES)
            )
            recovered = Life(again, folder).wait() == 0 and same(
                folder.with_suffix(".npz"), whole.with_suffix(".npz")
            )
            rows = [
                json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()
            ]
            good = (saved or told) and recovered and rows == list(range(STEPS))
            bad += not good
            print(
                f"{fault}: {took:.0f} s, steps {found['steps']}, "
                f"{found['error'][:150] or 'no error'}; the next run "
                f"{'the same' if recovered else 'DIFFERS'}",
                flush=True,
            )
            if not good:
                print(
                    (folder / "words").read_text()[-1500:] if (folder / "words").exists() else "",
                    flush=True,
                )
    print(
        f"{len(FAULTS)} faults: {bad} that ended without a cause, too late, or with a run that was "
        "lost"
    )


if __name__ == "__main__":
    main()
