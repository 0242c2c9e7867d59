"""Settings of the whole suite: eight virtual devices, x64, strict promotion, warnings as errors
(pyproject), a persistent compilation cache."""

import gc
import os
import signal
import tempfile
import zlib
from pathlib import Path

# Most of the suite's time is compilation: LLVM's part of it halves without its optimizations, and
# the older emitters of fused loops save another quarter. Flags given from outside replace these.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "bilevax-jax-cache")
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

MAPS = Path("/proc/self/maps")  # Linux only; elsewhere nothing needs to be done
MANY_MAPS = 30_000
tests_run = 0


def pytest_runtest_teardown(item, nextitem):
    """Programs compiled for a CPU hold a dozen memory maps each; past Linux's limit (65,530) the
    next one is a segmentation fault."""
    global tests_run
    tests_run += 1
    if tests_run % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(config, items):
    """With TESTS_TURN set to a number from 0 to 5, of the tests marked `turns` only that sixth is
    run: the same one in every worker."""
    turn = os.environ.get("TESTS_TURN")
    if turn is None:
        return
    waits = [
        item
        for item in items
        if item.get_closest_marker("turns") and zlib.crc32(item.nodeid.encode()) % 6 != int(turn)
    ]
    config.hook.pytest_deselected(items=waits)
    items[:] = [item for item in items if item not in set(waits)]
