"""A replay in a process of its own, to be killed."""

import os
import signal
import subprocess
import sys

PROGRAM = """
import os, sys, time
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
import bilevax as bx
from tests.replay import problem as trainings
folder, out, slow = sys.argv[1], sys.argv[2], float(sys.argv[3])
problem = trainings.make(40)
data = jax.tree.map(np.asarray, problem.data)
def read(step):
    time.sleep(slow)
    print("step", step, flush=True)
    return jax.tree.map(lambda a: a[step], data)
fn = bx.replay.value_and_metagrad(
    trainings.inner, trainings.quality, trainings.adam, 40, checkpoint=bx.checkpoint.every(3, folder)
)
found = fn(problem.params, problem.outer, bx.replay.reader(read), problem.batch)
leaves = jax.tree.leaves((found.value, found.grad, found.inner_params, found.init_grad))
np.savez(out, *map(np.asarray, leaves))
print("resumed", found.info["resumed_from"], flush=True)
"""


def killed_after(folder, out, lines: int) -> bool:
    """Run the program and kill it, without a word, after so many steps; whether it was done before
    that."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(out), "0.002"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": "."},
    )
    for count, _ in enumerate(process.stdout, start=1):
        if count == lines:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait() == 0
