"""Without a GPU, Triton's kernels are interpreted on the CPU: Triton decides that when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
