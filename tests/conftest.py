"""Without a GPU, Triton's kernels run in its interpreter: a choice to be made before anything imports triton, as
torch.compile does."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
