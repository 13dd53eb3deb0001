"""Run without the interpreter: a plan hands Triton's launcher what the launch of an op itself hands it.

    python tests/kernels/replayed.py 90

Prints JSON: kinds of plans, what differs, and what addresses have to do with it.
"""

import collections
import json
import sys

import torch

from ditq_kernels._triton.offline import stub

stub.install(int(sys.argv[1]))

from triton.runtime import driver  # noqa: E402

import ditq_kernels as k  # noqa: E402
from ditq_bench.host.cases import calls  # noqa: E402
from ditq_kernels._triton.parts import written  # noqa: E402
from ditq_kernels.launch import plans  # noqa: E402

taken = []  # memory of all calls, kept, so that none of it is at one place twice


def keeping(take):
    def kept(*arguments, **options):
        taken.append(take(*arguments, **options))
        return taken[-1]

    return kept


torch.empty, torch.empty_strided = keeping(torch.empty), keeping(torch.empty_strided)
written.TAKE["cpu"] = keeping(written.TAKE["cpu"])
LOWEST_ADDRESS = 2**32  # no size or stride of the cases reaches it
launches = []
utils = driver.active.utils
run = utils.launch


def noted(*arguments):
    """Grid, stream and function, then what the kernel gets."""
    launches.append((arguments[7], arguments[:5], leaves(arguments[-1])))
    return run(*arguments)


utils.launch = noted


def leaves(value):
    """Of nested tuples; a tensor is where it is."""
    if isinstance(value, (tuple, list)):
        return [leaf for one in value for leaf in leaves(one)]
    if isinstance(value, torch.Tensor):
        return [("at", value.data_ptr())]
    # a plan hands over addresses, Triton asks tensors for them
    return [("at", value)] if type(value) is int and value >= LOWEST_ADDRESS else [str(value)]


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
    return type(next(iter(plans._plans.values()))[0].plan).__name__, wrong


def tensors(result):
    return [
        t
        for t in (result if isinstance(result, tuple) else (result,))
        if isinstance(t, torch.Tensor)
    ]


def other_addresses():
    """How many plans, and whether each call takes one: the same shapes at multiples of 16 and elsewhere."""
    plans.clear()
    memory = torch.ones(4 * 64 + 16, dtype=torch.int8)
    weight, steps = torch.ones(16, 64, dtype=torch.int8), (torch.ones(4), torch.ones(16))
    taken = []
    for at in (0, 8, 0, 4, 16):
        q = memory[at : at + 4 * 64].view(4, 64)
        found = [one for alike in plans._plans.values() for one in alike]
        full = (q, weight, *steps, *(None,) * 3, torch.float32, *(None,) * 3)
        k.gemm_w8a8(*full[:4])
        taken.append(any(one.run(full, (q, weight, *steps)) is not None for one in found))
    return {"plans": sum(map(len, plans._plans.values())), "taken": taken}


def one_place():
    """Two arguments that are one tensor, which need not be one the next time."""
    plans.clear()
    steps = torch.ones(1)
    codes = [torch.ones(1, 1, 16, 64, dtype=torch.int8) for _ in "qkv"]
    for _ in range(2):
        k.attention_qk_int8_pv_int8(*codes, steps, steps, steps, softmax_scale=1.0)
    return type(next(iter(plans._plans.values()))[0].plan).__name__


with torch.no_grad():
    found = {name: difference(call) for name, call in calls(torch.device("cpu")).items()}
    report = {
        "kinds": collections.Counter(kind for kind, _ in found.values()),
        "wrong": {name: wrong for name, (_, wrong) in found.items() if wrong},
        "addresses": other_addresses(),
        "one_place": one_place(),
    }
sys.stdout.write(json.dumps(report))
