"""Without a GPU, Triton's kernels are interpreted on the CPU: Triton decides that when it is first imported.

A shell starts what is put into its background deaf to Ctrl-C, and so would be the commands that tests interrupt.
"""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

signal.signal(signal.SIGINT, signal.default_int_handler)
