"""Without a GPU, Triton's kernels are interpreted on the CPU: Triton decides that when it is first imported.

The tests' models are tiny: a second thread costs more than it brings. A shell starts what is put into its background
deaf to Ctrl-C, and so would be the commands that tests interrupt.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # reads the number of threads when it is imported

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.disks import read_only, small_disk  # noqa: F401 (fixtures)

signal.signal(signal.SIGINT, signal.default_int_handler)
