"""Triton kernels of every operator of fastnn's table, with their launchers.

A launcher has its operator's name and arguments. Imports torch and triton only, never fastnn.
"""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
