"""Tests share the machine: threads of OpenMP that wait for each other sleep. Before torch loads."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
