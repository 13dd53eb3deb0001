"""What the kernels share: rounding, GELU, tile order, launch plumbing."""

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts import stages, versions
from ditq_kernels.codes import numerics
from ditq_kernels.launch import recording

INT8_MAX = tl.constexpr(numerics.INT8_MAX)
INT8_MIN = tl.constexpr(-numerics.INT8_OFFSET)
MIN_SCALE = tl.constexpr(numerics.MIN_SCALE)
ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2**23: at this size fp32 has no fraction
# exp(-2 u) is exp2 of these times x and x**3, where u = sqrt(2 / pi) * (x + 0.044715 * x**3)
GELU_LINEAR = tl.constexpr(-2 * math.sqrt(2 / math.pi) * math.log2(math.e))
GELU_CUBIC = tl.constexpr(-2 * math.sqrt(2 / math.pi) * math.log2(math.e) * 0.044715)
GROUP_T = 8  # token tiles walked before the next output tile, so that neighbours share L2

INTERPRETED = triton.knobs.runtime.interpret  # no inline assembly there


@triton.jit
def rounded_steps(x, inv_scale, low, high):
    """clamp(round(x * inv_scale), low, high) as int32, ties to even; |low|, |high| < 2**22 integers.

    Clamping first is the same: rounding is monotonic and leaves the integers low and high alone.
    It brings the product into the range where adding 1.5 * 2**23 rounds, and leaves the integer in
    the low bits. Needs no float-to-int conversion, which runs on a slow unit.
    """
    y = tl.minimum(tl.maximum(x * inv_scale, low), high)
    return (y + ROUND_TO_INTEGER).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def static_codes(x, scale_ptr, zero_point_ptr):
    """Int32 codes of x with one asymmetric scale."""
    # div_rn, not `/`: on NVIDIA `/` may be 2 ulp off, and the interpreter does not show it
    return asymmetric_codes(x, tl.div_rn(1.0, tl.load(scale_ptr)), tl.load(zero_point_ptr))


@triton.jit
def asymmetric_codes(x, inv_scale, zero_point):
    """Int32 codes of x: zero_point + round(x * inv_scale), inside of int8."""
    low = (-zero_point + INT8_MIN).to(tl.float32)
    high = (-zero_point + INT8_MAX).to(tl.float32)
    return rounded_steps(x, inv_scale, low, high) + zero_point


@triton.jit
def gelu_tanh(x):
    """GELU in its tanh form, x * sigmoid(2 u), within 2**-21 * |x|: one exp2 and one fast division.

    exp2 runs to infinity or zero at both ends, and with it the result to -0 or x.
    """
    exponent = x * (GELU_LINEAR + GELU_CUBIC * (x * x))
    return x / (1.0 + tl.exp2(exponent))


@triton.jit
def tile_of_program(T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_T: tl.constexpr):
    """Token tile and output tile of this program: GROUP_T token tiles share each output tile."""
    return tile_of(tl.program_id(0), T, N, BLOCK_T, BLOCK_N, GROUP_T)


@triton.jit
def tile_of(program, T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_T: tl.constexpr):
    """As `tile_of_program`, for a program of any number."""
    tiles_t = tl.cdiv(T, BLOCK_T)
    programs_per_group = GROUP_T * tl.cdiv(N, BLOCK_N)
    first_t = (program // programs_per_group) * GROUP_T
    group_t = tl.minimum(tiles_t - first_t, GROUP_T)
    inside = program % programs_per_group
    return first_t + inside % group_t, inside // group_t


def run_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`; a recording of this thread gets the compiled kernel and all arguments."""
    compiled = kernel[grid](*arguments, **options)
    run = recording.active()
    if run is not None and not INTERPRETED:
        constants = (options[name] for name in kernel.arg_names[len(arguments) :])
        run.launches.append((compiled, grid, (*arguments, *constants)))


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU current for a launch; refuses GPUs and Triton releases we do not run on."""
    versions.check_device(tensor.device, triton.__version__)
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    return _WithOurPasses(device) if stages.NEEDED else device


class _WithOurPasses(stages.our_passes):
    """A device and our compiler passes at once; classes, because a launch counts microseconds."""

    def __init__(self, device: contextlib.AbstractContextManager) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.device.__enter__()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.device.__exit__(*error)
