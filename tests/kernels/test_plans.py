"""Calls without the dispatcher: the same bits, the same refusals, and never where somebody looks on."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ditq_kernels as k
from ditq_bench.host.cases import calls
from ditq_kernels.launch import plans
from ditq_kernels.ops import dispatch
from ditq_kernels.ops.library import OPS, plan_fault

CALLS = calls(torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_plans():
    plans.clear()
    yield
    plans.clear()


def parts(result):
    """The tensors of a result, and what is not one."""
    return result if isinstance(result, tuple) else (result,)


def assert_same(found, expected):
    for mine, theirs in zip(parts(found), parts(expected), strict=True):
        if isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        else:
            assert mine is theirs


class Seen(TorchDispatchMode):
    """Names of our ops that the dispatcher ran."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ditq":
            self.ops.append(func._schema.name.removeprefix("ditq::"))
        return func(*args, **(kwargs or {}))


def test_there_is_a_case_of_every_op():
    named = {name.partition(",")[0] for name in CALLS}
    assert named == set(OPS) - {"linear_w4_per_group"}  # which runs in torch


@pytest.mark.parametrize("name", CALLS)
def test_a_kept_plan_gives_the_bits_of_the_dispatcher(name):
    call = CALLS[name]
    with Seen() as mode:
        expected = call()
    assert mode.ops == [name.partition(",")[0]]
    assert not plans._plans
    assert_same(call(), expected)  # checked, and keeps its plan
    assert len(plans._plans) == 1
    assert_same(call(), expected)
    assert len(plans._plans) == 1


@pytest.fixture(params=["reference", "dot products", "pairs"])
def way(request, monkeypatch, processor):
    """Every way a CPU has to run an op."""
    processor(avx_vnni=request.param == "dot products")
    monkeypatch.setattr(
        "ditq_kernels.launch.backend._reference_on",
        {"cpu"} if request.param == "reference" else set(),
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("way")
def test_autocast_changes_no_bit(name, dtype):
    expected = CALLS[name]()
    with torch.autocast("cpu", dtype=dtype):
        assert_same(CALLS[name](), expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("way")
def test_defaults_of_torch_change_no_bit(name):
    expected = CALLS[name]()
    plans.clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(CALLS[name](), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert_same(CALLS[name](), expected)
    with torch.inference_mode():
        assert_same(CALLS[name](), expected)


def gemm():
    """Arguments of gemm_w8a8, by name."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (4, 64), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (8, 64), generator=generator, dtype=torch.int8)
    return {"q": q, "weight": weight, "scale": torch.ones(4), "weight_scale": torch.ones(8)}


@pytest.mark.parametrize(
    "change",
    [
        {"scale": torch.ones(3)},
        {"scale": torch.ones(4).half()},
        {"scale": torch.ones(8)[::2]},
        {"weight": torch.zeros(8, 32, dtype=torch.int8)},
        {"weight": torch.zeros(64, 8, dtype=torch.int8).t()},
        {"weight": torch.zeros(8, 64, dtype=torch.int8, device="meta")},
        {"out_dtype": torch.float64},
        {"zero_point": torch.zeros(1, dtype=torch.int32)},
    ],
)
def test_what_is_refused_is_refused_after_a_plan_was_kept(change):
    for _ in range(2):
        k.gemm_w8a8(**gemm())
    with pytest.raises(ValueError, match=r"^gemm_w8a8: "):
        k.gemm_w8a8(**gemm() | change)


def test_a_tensor_that_changed_in_place_has_another_signature():
    arguments = gemm()
    k.gemm_w8a8(**arguments)
    arguments["weight_scale"].data = torch.ones(8).double()
    with pytest.raises(ValueError, match="weight_scale must be"):
        k.gemm_w8a8(**arguments)


def looked_on():
    """Every way to look on, or to take part, that a direct call would miss."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    return {
        "dispatch mode": Seen,
        "function mode": Function,
        "profiler": torch.autograd.profiler.profile,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "fake mode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    }


@pytest.mark.parametrize("way", looked_on())
def test_a_plan_is_never_taken_where_somebody_looks_on(way):
    arguments = tuple(gemm().values())
    k.gemm_w8a8(*arguments)
    assert len(plans._plans) == 1
    full = (*arguments, None, None, None, torch.float32, None, None, None)
    with looked_on()[way]():
        assert not plans.direct(arguments)
        assert dispatch.gemm_w8a8.by_plan(full) is None
    assert plans.direct(arguments)
    assert dispatch.gemm_w8a8.by_plan(full) is not None


def test_the_profiler_names_the_op():
    k.gemm_w8a8(**gemm())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        k.gemm_w8a8(**gemm())
    assert "ditq::gemm_w8a8" in {event.key for event in profile.key_averages()}


def test_vmap_and_fake_tensors_reach_the_dispatcher():
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = gemm()
    k.gemm_w8a8(**arguments)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in arguments.items()}
    assert type(k.gemm_w8a8(**fake)) is type(fake["q"])  # outside of the mode, too
    seen = []

    def one(scale):
        seen.append(plans.direct((scale,)))
        return scale

    torch.vmap(one)(torch.ones(2, 4))
    assert seen == [False]


def test_meta_tensors_get_shapes_only():
    for _ in range(2):
        y = k.gemm_w8a8(**{name: value.to("meta") for name, value in gemm().items()})
        assert (y.device.type, y.shape) == ("meta", (4, 8))
    assert not plans._plans


@pytest.mark.parametrize("kept", [False, True])
def test_backward_raises_one_sentence(kept):
    x = torch.randn(4, 64, requires_grad=True)
    if kept:
        k.quantize_per_token(x.detach())
    q, scale = k.quantize_per_token(x)
    assert not q.requires_grad
    y = k.gemm_w8a8(**gemm() | {"q": q, "scale": scale})
    assert y.requires_grad
    with pytest.raises(RuntimeError, match=r"^backward: the ops of ditq are for inference"):
        y.sum().backward()


def test_compiled_training_raises_it_too():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(x):
        q, scale = k.quantize_per_token(x)
        return k.gemm_w8a8(**gemm_of | {"q": q, "scale": scale})

    gemm_of = gemm()
    x = torch.randn(4, 64)
    with torch.no_grad():
        q, scale = k.quantize_per_token(x)
        assert torch.equal(layer(x), k.gemm_w8a8(**gemm_of | {"q": q, "scale": scale}))
    with pytest.raises(RuntimeError, match="ops of ditq are for inference"):
        layer(x.requires_grad_()).sum().backward()
    torch.compiler.reset()


def test_plans_start_over_at_their_limit(monkeypatch):
    monkeypatch.setattr(plans, "LIMIT", 3)
    for tokens in range(1, 9):
        k.quantize_per_token(torch.ones(tokens, 32))
        assert len(plans._plans) <= 3


def test_layers_of_one_input_have_plans_of_their_own(monkeypatch):
    monkeypatch.setattr(plans, "ALIKE", 3)
    q, step = torch.ones(4, 64, dtype=torch.int8), torch.ones(4)
    for outputs in (8, 16, 24, 32, 8):
        for _ in range(2):
            y = k.gemm_w8a8(q, torch.ones(outputs, 64, dtype=torch.int8), step, torch.ones(outputs))
            assert torch.equal(y, torch.full((4, outputs), 64.0))
        (alike,) = plans._plans.values()
        assert len(alike) <= 3


def test_one_tensor_in_two_places_is_no_signature_of_two():
    arguments = gemm() | {
        "weight": torch.ones(4, 64, dtype=torch.int8),
        "weight_scale": torch.ones(4),
    }
    two = k.gemm_w8a8(**arguments)
    one = k.gemm_w8a8(**arguments | {"scale": arguments["weight_scale"]})
    assert torch.equal(one, two)
    assert torch.equal(k.gemm_w8a8(**arguments), two)


def test_a_gradient_takes_no_plan_where_the_same_tensor_took_one():
    x = torch.randn(4, 64, requires_grad=True)
    with torch.no_grad():
        for _ in range(2):
            k.quantize_per_token(x)
        assert dispatch.quantize_per_token.by_plan((x, None, None, None, False)) is not None
    assert dispatch.quantize_per_token.by_plan((x, None, None, None, False)) is None


def test_a_poisoned_plan_is_a_fault():
    arguments = gemm()
    k.gemm_w8a8(**arguments)
    full = (*arguments.values(), None, None, None, torch.float32, None, None, None)
    assert (
        plan_fault("gemm_w8a8", full[:8]) == ""
    )  # as the dispatcher passes it: defaults are left out
    (key,) = plans._plans
    poison = plans.FunctionPlan(dispatch.linear_w8)
    plans._plans[key] = [one._replace(plan=poison) for one in plans._plans[key]]
    assert "the plan kept for gemm_w8a8 is FunctionPlan(op=Op(name='linear_w8'" in plan_fault(
        "gemm_w8a8", full
    )


def test_an_op_without_a_plan_has_no_fault():
    assert plan_fault("gemm_w8a8", (*gemm().values(), None, None, None, torch.float32)) == ""
