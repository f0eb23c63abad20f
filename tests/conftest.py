"""Tests share the machine: threads of OpenMP that wait for each other sleep. Before torch loads."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # librosa would compile for half a minute on a fresh machine
