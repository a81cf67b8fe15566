"""Says in one sentence what this machine lacks to set fastnn up; prints nothing when nothing is.

Runs before there is a virtual environment and under Pythons too old for fastnn, so it keeps to the
syntax of Python 3.6.
"""

import os
import re
import shutil
import sys
import sysconfig

PYTHON = (3, 10)
TORCH = ((2, 11), (2, 13))


def missing(torch):
    if sys.version_info < PYTHON:
        return (
            f"Python {PYTHON[0]}.{PYTHON[1]} or later is needed, {sys.executable} is version"
            f" {sys.version_info[0]}.{sys.version_info[1]}: install one and name it,"
            " make PYTHON=python3.12"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        return (
            f"Python's {error.name} module is missing: install the venv package of this Python"
            " (Debian, Ubuntu: apt-get install python3-venv)"
        )
    number = re.match(r"(\d+)\.(\d+)\.\d+", torch)
    if number is None:
        return f"TORCH must be a full version such as 2.13.0, got {torch!r}"
    if not TORCH[0] <= (int(number.group(1)), int(number.group(2))) <= TORCH[1]:
        first, last = (".".join(map(str, version)) for version in TORCH)
        return f"torch {torch} is not supported: install one from {first} to {last}, TORCH={last}.0"
    if os.environ.get("FASTNN_BUILD_EXT") == "0":
        return None
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return (
            f"no C++ compiler ({compiler}) was found: install g++ 11 or later (Debian, Ubuntu:"
            " apt-get install g++), or set FASTNN_BUILD_EXT=0 to do without the C++ kernels"
        )
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return (
            "Python.h was not found: install the development package of this Python (Debian,"
            " Ubuntu: apt-get install python3-dev), or set FASTNN_BUILD_EXT=0 to do without the"
            " C++ kernels"
        )
    return None


if __name__ == "__main__":
    sentence = missing(sys.argv[1])
    if sentence is not None:
        sys.exit("fastnn: " + sentence)
