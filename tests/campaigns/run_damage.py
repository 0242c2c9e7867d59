"""Checkpoints that are damaged at random are noticed, or the damage is of no consequence: ``python
-m tests.campaigns.run_damage --trials 200``.

Any file of the newest checkpoint, its listing included: a bit flipped, cut off, zeroed, removed,
lengthened. The run that goes on must end with the bits of the undisturbed one. The last line is the
summary.
"""

import argparse
import pathlib
import random
import shutil
import tempfile
import warnings

import bilevax as bx
from tests.run.checkpoint_problem import bits, solve

STEPS = 61


def damage(path: pathlib.Path, rng: random.Random) -> str:
    kind = rng.choice(("flip", "cut", "zero", "remove", "lengthen"))
    content = bytearray(path.read_bytes())
    if kind == "remove":
        path.unlink()
        return kind
    if kind == "flip" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if kind == "cut":
        content = content[: int(rng.random() * len(content))]
    if kind == "zero":
        content = bytearray(len(content))
    if kind == "lengthen":
        content += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 50)))
    path.write_bytes(bytes(content))
    return kind


def main(trials: int, seed: int) -> None:
    rng, noticed, wrong, failed = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as top:
        saved, folder = pathlib.Path(top) / "saved", pathlib.Path(top) / "run"
        solve(60, checkpoint=bx.checkpoint.every(20, saved))
        whole = {name: a.tobytes() for name, a in bits(solve(STEPS)).items()}
        for trial in range(trials):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(saved, folder)
            files = sorted(
                path for path in (folder / "step_000000060").rglob("*") if path.is_file()
            )
            path = rng.choice([*files, folder / "step_000000060" / "bilevax_files.json"])
            kind = damage(path, rng)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                try:
                    out = solve(STEPS, checkpoint=bx.checkpoint.every(20, folder))
                except Exception as error:
                    failed += 1
                    print(f"trial {trial}: {kind} of {path.name}: {type(error).__name__}: {error}")
                    continue
            told = any("is damaged" in str(w.message) for w in seen)
            noticed += told
            same = {name: a.tobytes() for name, a in bits(out).items()} == whole
            if not same or told != (out.stats["resumed_from"] == 40):
                wrong += 1
                print(
                    f"trial {trial}: {kind} of {path.name}: told {told}, resumed from "
                    f"{out.stats['resumed_from']}, same bits {same}"
                )
    print(
        f"{trials} trials: {noticed} noticed, {trials - noticed - failed - wrong} harmless, "
        f"{wrong} silent and wrong, {failed} ended in an error"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
