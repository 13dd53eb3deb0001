"""Run without the interpreter: a plan hands Triton's launcher what the launch of an op itself hands it.

    python tests/kernels/replayed.py 90

Prints JSON: kinds of plans, what differs, and what becomes of plans of prepared weights.
"""

import collections
import gc
import json
import sys

import torch

from ditq_kernels._triton.offline import stub

stub.install(int(sys.argv[1]))

from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402

import ditq_kernels as k  # noqa: E402
from ditq_bench.host.cases import calls  # noqa: E402
from ditq_kernels.launch import plans  # noqa: E402

taken = []  # memory of all calls, kept, so that none of it is at one place twice


def keeping(take):
    def kept(*arguments, **options):
        taken.append(take(*arguments, **options))
        return taken[-1]

    return kept


torch.empty, torch.empty_strided = keeping(torch.empty), keeping(torch.empty_strided)
launches = []
run = CudaLauncher.__call__


def noted(self, *arguments):
    """Grid, stream, function and metadata, hooks, then those of the kernel."""
    launches.append((id(self), arguments[:4], leaves(arguments[9:])))
    return run(self, *arguments)


CudaLauncher.__call__ = noted


def leaves(value):
    """Of nested tuples; a tensor is where it is."""
    if isinstance(value, (tuple, list)):
        return [leaf for one in value for leaf in leaves(one)]
    return [("at", value.data_ptr())] if isinstance(value, torch.Tensor) else [str(value)]


def launched(call):
    """The result of one call, and what it handed over."""
    launches.clear()
    return call(), list(launches)


def pointers(found):
    return {leaf for *_, arguments in found for leaf in arguments if leaf[0] == "at"}


def named(found, given):
    """Memory that a call took itself is somewhere else each time: named by the order of its appearance."""
    order = {}
    return [
        (launcher, grid, [
            ("memory", order.setdefault(leaf, len(order))) if leaf[0] == "at" and leaf not in given else leaf
            for leaf in arguments
        ])
        for launcher, grid, arguments in found
    ]  # fmt: skip


def difference(call):
    """The kind of plan, and how a call by it differs from Triton's own way."""
    call()  # prepares weights
    own = []
    for _ in range(2):  # what is at one place in both was given
        plans.clear()
        own.append(launched(call))
    given = pointers(own[0][1]) & pointers(own[1][1])
    result, found = launched(call)
    wrong = (
        []
        if found and named(found, given) == named(own[1][1], given)
        else [str(found), str(own[1][1])]
    )
    pair = (own[1][0], result)
    layouts = [[(t.shape, t.stride(), t.dtype) for t in tensors(one)] for one in pair]
    wrong += [] if layouts[0] == layouts[1] else [str(layouts)]
    return type(next(iter(plans._plans.values()))).__name__, wrong


def tensors(result):
    return [
        t
        for t in (result if isinstance(result, tuple) else (result,))
        if isinstance(t, torch.Tensor)
    ]


def prepared_weights():
    """How many layers have a plan: after two, after a change in place, after one is gone; and without versions."""
    plans.clear()
    q, scale = torch.ones(4, 64, dtype=torch.int8), torch.ones(4)
    layers = [k.quantize_weight_w4p(torch.randn(16, 64), 64) for _ in range(2)]

    def multiply(w):
        k.gemm_w4a8(q, w.packed, scale, w.group_scale, w.group_offset, w.scale)
        return len(next(iter(plans._plans.values())).plans)

    counts = [multiply(w) for w in layers]
    key = set(next(iter(plans._plans.values())).plans)
    layers[0].packed.add_(1)
    counts.append(multiply(layers[0]))
    changed = set(next(iter(plans._plans.values())).plans) != key
    layers.pop()
    gc.collect()
    counts.append(multiply(layers[0]))
    plans.clear()
    with torch.inference_mode():
        w = k.quantize_weight_w4p(torch.randn(16, 64), 64)
        k.gemm_w4a8(q, w.packed, scale, w.group_scale, w.group_offset, w.scale)
    return {
        "counts": counts,
        "changed": changed,
        "inference": type(next(iter(plans._plans.values()))).__name__,
    }


def one_place():
    """Two arguments that are one tensor, which need not be one the next time."""
    plans.clear()
    steps = torch.ones(1)
    codes = [torch.ones(1, 1, 16, 64, dtype=torch.int8) for _ in "qkv"]
    for _ in range(2):
        k.attention_qk_int8_pv_int8(*codes, steps, steps, steps, softmax_scale=1.0)
    return type(next(iter(plans._plans.values()))).__name__


with torch.no_grad():
    found = {name: difference(call) for name, call in calls(torch.device("cpu")).items()}
    report = {
        "kinds": collections.Counter(kind for kind, _ in found.values()),
        "wrong": {name: wrong for name, (_, wrong) in found.items() if wrong},
        "prepared": prepared_weights(),
        "one_place": one_place(),
    }
sys.stdout.write(json.dumps(report))
