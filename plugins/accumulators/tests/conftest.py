"""Without a GPU, Triton's interpreter runs the kernel for GPUs: Triton has to know before it is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
