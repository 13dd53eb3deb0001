"""Triton is interpreted wherever there is no GPU. Set here, before any test imports it: diffusers does."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
