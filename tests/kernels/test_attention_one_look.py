"""One look at the keys: against a running maximum in fp64, and against exact softmax within a derived bound."""

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import attention_qk_int8_pv_bf16 as bf16
from ditq_kernels._triton import attention_qk_int8_pv_int8 as int8
from ditq_kernels.launch.tuning import AttentionConfig
from ditq_kernels.reference import attention as reference

TILE = 32  # keys
CONFIG = AttentionConfig(16, TILE, 4, 2)
EXP2_ERROR = 2.0**-22 + 2.0**-24
SCORES = ("q", "k", "q_scale", "k_scale", "softmax_scale", "key_mask")


def int8_arguments(p, device="cpu"):
    names = ("q", "k", "v", "q_scale", "k_scale", "v_scale", "v_zero_point")
    return [moved(p[n], device) for n in (*names, "softmax_scale", "key_mask")]


def bf16_arguments(p, device="cpu"):
    names = ("q", "k", "values", "q_scale", "k_scale", "softmax_scale", "key_mask")
    return [moved(p[n], device) for n in names]


def moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def logits_of(p):
    """Base-2 logits [B, H, Tq, Tk], fp64: the fp32 values that both sides exponentiate."""
    total = (p["q"].double() @ p["k"].double().mT).float()
    step = torch.tensor(p["softmax_scale"] * 1.4426950408889634, dtype=torch.float32)
    q_scale, k_scale = (reference._per_row(p[n]) for n in ("q_scale", "k_scale"))
    logits = (total * ((q_scale * step) * k_scale.mT)).double()
    if p["key_mask"] is not None:
        logits = logits.masked_fill(~p["key_mask"][:, None, None], -torch.inf)
    return logits


def walk(logits, weigh):
    """Weights [B, H, Tq, Tk] of a running maximum over tiles, and by how much they may be off.

    `weigh` of p of a tile, relative to the maximum so far, gives weights and how far they may be off.
    """
    top = torch.full(logits.shape[:3], -3e38, dtype=torch.float64)
    weights, slack = torch.zeros_like(logits), torch.zeros_like(logits)
    for tile in torch.arange(logits.shape[3]).split(TILE):
        higher = torch.maximum(top, logits[..., tile].amax(3))
        kept = torch.exp2(top - higher)[..., None]
        weights, slack, top = weights * kept, slack * kept, higher
        # two fp32 roundings of the exponent: of the difference here, of all later rescalings together
        p = torch.exp2(logits[..., tile] - top[..., None])
        weights[..., tile], slack[..., tile] = weigh(p)
    tiles = -(-logits.shape[3] // TILE)
    span = (logits.amax(3, keepdim=True) - logits).clamp(0, 200)
    relative = tiles * (EXP2_ERROR + 2.0**-23) + 0.7 * 2.0**-23 * span
    return weights, slack + relative * weights


def bound_of(weights, slack, values, scale):
    """Outputs, and their largest difference if weights are off by slack: sum(slack * |v - o|) / sum(weights).

    Sums of a tile round once and are rescaled once: 2**-23 a tile of the sum of |weights * v|, twice for the divisor.
    """
    total = weights.sum(3, keepdim=True).clamp_min(1e-30)
    o = weights @ values / total
    moved = slack @ values.abs() + slack.sum(3, keepdim=True) * o.abs()
    tiles = -(-weights.shape[3] // TILE)
    rounding = (3 * tiles + 6) * 2.0**-23 * (weights @ values.abs() / total + o.abs())
    return o * scale, (1.05 * moved / total + rounding) * scale


def check(got, o, bound):
    excess = (got.cpu().double() - o).abs() - bound
    assert not got.isnan().any()
    assert (excess <= 0).all(), f"{int((excess > 0).sum())} outputs exceed by {excess.max():.2e}"


# odd and off-tile in queries and keys, several tiles
SHAPES = [(17, 40, 64), (18, 65, 72), (5, 96, 88), (3, 130, 128)]


@pytest.mark.parametrize(("queries", "keys", "head_dim"), SHAPES)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_codes_of_a_running_maximum(
    queries, keys, head_dim, mask, device, attention_problem, generator
):
    p = attention_problem(queries, keys, head_dim, generator, mask=mask)
    got = int8.launch(*int8_arguments(p, device), torch.float32, config=CONFIG)

    def weigh(probabilities):
        steps = 255 * probabilities
        off = steps * (EXP2_ERROR + 2.0**-20)  # and the fp32 difference in the exponent, below 16
        near = ((steps - steps.floor() - 0.5).abs() <= off).double()
        return steps.round(), near  # by one code, where the error may cross a tie

    weights, slack = walk(logits_of(p), weigh)
    values = p["v"].double() - p["v_zero_point"].double()[:, None, None]
    check(got, *bound_of(weights, slack, values, p["v_scale"].double()[:, None, None]))


@pytest.mark.parametrize(("queries", "keys", "head_dim"), SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_bf16_weights_of_a_running_maximum(
    queries, keys, head_dim, device, attention_problem, generator
):
    p = attention_problem(queries, keys, head_dim, generator)
    got = bf16.launch(*bf16_arguments(p, device), torch.float32, config=CONFIG)
    weights, slack = walk(logits_of(p), lambda x: (x, 2.0**-8 * x))  # bf16 has 8 bits
    check(got, *bound_of(weights, slack, p["values"].double(), 1.0))


def cases(p, device):
    """Outputs of both ops, their fp64 values [B, H, Tk, D], the largest error of a key's weight as (code, share)."""
    values = p["v"].double() - p["v_zero_point"].double()[:, None, None]
    values *= p["v_scale"].double()[:, None, None]
    yield (
        int8.launch(*int8_arguments(p, device), torch.float32, config=CONFIG),
        values,
        (0.51 / 255, 0),
    )
    got = bf16.launch(*bf16_arguments(p, device), torch.float32, config=CONFIG)
    yield got, p["values"].double(), (0, 2.0**-8)


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_error_against_exact_softmax(spread, device, attention_problem, generator):
    """sum(error_j * |v_j - o|) / sum(p): half a code of 255 each, or 2**-8 of a weight."""
    p = attention_problem(9, 200, 64, generator, batch=1)
    p["softmax_scale"] *= spread
    weights = torch.exp2(logits_of(p) - logits_of(p).amax(3, keepdim=True))
    for got, values, (code, share) in cases(p, device):
        slack = code * (weights > 0) + (share + 2.0**-18) * weights
        check(got, *bound_of(weights, slack, values, 1.0))


def test_early_tiles_are_no_coarser_than_strict(device, attention_problem, generator):
    """Over many problems, one look is no worse than two against exact softmax: its codes have finer steps."""
    errors = {False: 0.0, True: 0.0}
    for _ in range(4):
        p = attention_problem(8, 256, 32, generator, batch=1, mask=False)
        p["softmax_scale"] *= 3
        weights = torch.softmax(logits_of(p) * 0.6931471805599453, 3)
        exact = weights @ (p["v"].double() - p["v_zero_point"].double()[:, None, None])
        exact *= p["v_scale"].double()[:, None, None]
        for strict in errors:
            arguments = int8_arguments(p, device)
            got = int8.launch(*arguments, torch.float32, strict=strict, config=CONFIG)
            errors[strict] += (got.cpu().double() - exact).square().sum().item()
    assert errors[False] < errors[True]


@pytest.mark.parametrize("of", ["int8", "bf16"])
@pytest.mark.usefixtures("poisoned")
def test_masked_tiles_and_images(of, device, attention_problem, generator):
    """A first tile without keys, and an image without any: zeros there, the rest as if those keys were not there."""
    p = attention_problem(3, 3 * TILE, 32, generator)
    p["key_mask"][0, :TILE] = False
    p["key_mask"][1] = False
    module, arguments = {"int8": (int8, int8_arguments), "bf16": (bf16, bf16_arguments)}[of]
    got = module.launch(*arguments(p, device), torch.float32, config=CONFIG)
    assert got[1].count_nonzero() == 0
    fewer = p | {n: p[n][:, :, TILE:].contiguous() for n in ("k", "v", "values", "k_scale")}
    fewer["key_mask"] = p["key_mask"][:, TILE:].contiguous()
    assert torch.equal(
        module.launch(*arguments(fewer, device), torch.float32, config=CONFIG)[0], got[0]
    )


@pytest.mark.usefixtures("poisoned")
def test_values_with_tokens_inside(device, attention_problem, generator, monkeypatch):
    """Sums of each tile are made here or by the copy, with the same bits."""
    p = attention_problem(5, 100, 72, generator, heads=1)
    expected = int8.launch(*int8_arguments(p, device), torch.float32, config=CONFIG)
    memory = torch.full((2, 1, 72, 128), -128, dtype=torch.int8)
    memory[..., :100] = p["v"].mT
    p["v"] = memory.to(device)[..., :100].mT
    monkeypatch.setattr(int8.transpose_v, "launch", None)
    got = int8.launch(*int8_arguments(p, device), torch.float32, config=CONFIG)
    assert torch.equal(got, expected)


def test_keys_that_share_a_scale_are_looked_at_twice(device, attention_problem, generator):
    """Their first look compares integers: the result is the strict one."""
    p = attention_problem(5, 100, 64, generator, scales="per_head")
    arguments = int8_arguments(p, device)
    got = int8.launch(*arguments, torch.float32, config=CONFIG)
    assert torch.equal(got, int8.launch(*arguments, torch.float32, strict=True, config=CONFIG))


def test_more_keys_than_int32_can_sum(device, attention_problem, generator, monkeypatch):
    """Past the limit keys that share a scale are looked at once, too: as if each had that scale."""
    p = attention_problem(5, 100, 64, generator, scales="per_head")
    each = p | {
        n: p[n][None, :, None].expand(2, 2, t).contiguous()
        for n, t in (("q_scale", 5), ("k_scale", 100))
    }
    expected = int8.launch(*int8_arguments(each, device), torch.float32, config=CONFIG)
    monkeypatch.setattr(int8, "MAX_STRICT_KEYS", 99)
    got = int8.launch(*int8_arguments(p, device), torch.float32, config=CONFIG)
    assert torch.equal(got, expected)


def test_the_definition_of_more_keys_than_int32_can_sum():
    """34000 equal keys of value -128 - 127: their mean is exact, and int32 would have wrapped."""
    keys = torch.ones(1, 1, 34000, 32, dtype=torch.int8)
    v, one, zero = (
        torch.full_like(keys, -128),
        torch.ones(1),
        torch.tensor([127], dtype=torch.int32),
    )
    rest = {"softmax_scale": 1.0, "v_zero_point": zero}
    y = k.attention_qk_int8_pv_int8(keys[:, :, :1], keys, v, one, one, one, **rest)
    torch.testing.assert_close(y, torch.full_like(y, -255), rtol=2.0**-22, atol=0)
