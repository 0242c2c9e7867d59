"""Kill a replay at twenty moments, on the way there and back, and compare the bits it ends with.

    PYTHONPATH=. python tests/campaigns/replay_kills.py [--kills 20] [--seed 0]

Each life of the replay is killed without a word after a random number of steps; the next one goes
on from its files. A replay that comes to its end is compared with the undisturbed one, and the next
one begins, until all kills are done.
"""

import argparse
import random
import tempfile
from pathlib import Path

import numpy as np

from tests.replay.killing import killed_after


def main(kills: int, seed: int) -> bool:
    draw, done, ends, equal = random.Random(seed), 0, 0, True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        assert killed_after(folder / "whole", folder / "whole.npz", 10_000)
        whole = np.load(folder / "whole.npz")
        while done < kills or not ends:
            lines = draw.randint(5, 60) if done < kills else 10_000
            if not killed_after(folder / "run", folder / "found.npz", lines):
                done += 1
                continue
            found = np.load(folder / "found.npz")
            equal &= all(np.array_equal(whole[name], found[name]) for name in whole.files)
            ends += 1
    print(f"replay: {done} kills, {ends} replays that came to their end, all bits equal: {equal}")
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    raise SystemExit(0 if main(arguments.kills, arguments.seed) else 1)
