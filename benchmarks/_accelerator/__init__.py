"""The parts of accelerator.py, a file each, with ``run(part)``; and Betty's half, which runs
apart."""
