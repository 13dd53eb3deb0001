"""Expanding int4 weights: the kernel against numpy and against the packing's own definition, bit for bit."""

import json

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import w4_expand as kernel
from ditq_kernels.ops import dispatch


def problem(num_rows, in_features, group_size, generator):
    shape = (num_rows, in_features // group_size)
    scale = torch.randint(1, 18, shape, generator=generator)
    offset = (torch.rand(shape, generator=generator) * (256 - 15 * scale)).long() - 128
    codes = torch.randint(0, 16, (num_rows, in_features), generator=generator).to(torch.uint8)
    return codes, k.pack_int4(codes), scale.to(torch.uint8), offset.to(torch.int8)


# one, odd, off-tile rows; less than a program, exactly one, more
@pytest.mark.parametrize(
    ("num_rows", "in_features", "group_size"),
    [(1, 32, 32), (7, 96, 96), (5, 512, 64), (9, 1152, 128), (33, 640, 32)],
)
@pytest.mark.usefixtures("poisoned")
def test_kernel_and_op(num_rows, in_features, group_size, device, generator):
    codes, *parts = problem(num_rows, in_features, group_size, generator)
    scale, offset = (part.numpy().astype(np.int64) for part in parts[1:])
    grouped = codes.numpy().astype(np.int64).reshape(num_rows, -1, group_size)
    expected = (grouped * scale[..., None] + offset[..., None]).reshape(num_rows, in_features)
    assert np.abs(expected).max() <= 128
    for weight in (kernel.launch(*(p.to(device) for p in parts)).cpu(), k.w4_expand(*parts)):
        np.testing.assert_array_equal(weight.numpy().astype(np.int64), expected)


def test_opcheck_and_refusal(generator):
    _, *parts = problem(3, 64, 32, generator)
    torch.library.opcheck(dispatch.w4_expand.overload, tuple(parts))
    with pytest.raises(ValueError, match=r"^w4_expand: packed must be \[N, K / 2\] uint8"):
        k.w4_expand(parts[0].to(torch.int8), *parts[1:])


def test_machine_code(python_without_interpreter):
    program = (
        "import dataclasses, json; from ditq_kernels._triton.offline import compile as offline;"
        "found = [offline.compile_op('w4_expand', target) for target in (80, 89, 90)];"
        "print(json.dumps([dataclasses.asdict(c) for c in found]))"
    )
    for census in json.loads(python_without_interpreter("-c", program)):
        assert (census["stack"], census["spills"]) == (0, 0)
        assert not {"F2I", "I2F"} & set(census["whole"])
