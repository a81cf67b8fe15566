"""Settings every test shares."""

import os

# Triton reads this when it is imported: without a GPU its kernels run under the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
