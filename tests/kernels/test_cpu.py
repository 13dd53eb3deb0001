"""The `cpu` backend: integers against int64, every option against the reference to the bit, and when it is chosen.

`torch._int_mm` is exact on any processor and slow without int8 dot products: shapes are tiny. `pairs` is exact on any
processor whose int8 kernels torch has; with int8 dot products nothing in it could saturate.
"""

import itertools

import pytest
import torch

import ditq_kernels as k
from ditq_kernels import _cpu
from ditq_kernels._cpu import epilogue, pairs, per_group, product
from ditq_kernels.codes import packing
from ditq_kernels.launch import backend, cpu_features
from ditq_kernels.launch.prepared import copied_bytes, keep_copies
from ditq_kernels.reference import fused as reference_fused
from ditq_kernels.reference import linear as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    (1, 1, 32),
    (6, 33, 96),
    (70, 40, 160),
]  # tokens, outputs, inputs: one, odd, several blocks of rows


def int8(shape, generator):
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 32 rows and a few weight rows, so that small shapes have several, and a partial last one."""
    monkeypatch.setattr(epilogue, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(per_group, "BLOCK_ELEMENTS", 70 * 9)
    monkeypatch.setattr(product, "EXPANDED_BYTES", 96 * 7)


@pytest.fixture(params=["dot products", "pairs"])
def way(request, processor):
    """Both ways to multiply, one after the other; pairs need copies."""
    processor(avx_vnni=request.param == "dot products")
    keep_copies(request.param == "pairs")
    assert cpu_features.int8_gemm() == request.param
    return request.param


@pytest.mark.parity("P5")
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 1, 1), (3, 5, 17), (7, 33, 1000)])
def test_products_equal_int64(tokens, outputs, inputs, generator):
    wide_q, wide_w = int8((tokens, inputs + 9), generator), int8((outputs, inputs + 4), generator)
    q, weight = wide_q[:, 5 : inputs + 5], wide_w[:, :inputs]  # strided rows
    total = product.product(q, weight)
    assert total.is_contiguous()
    assert torch.equal(total.long(), q.long() @ weight.long().t())


@pytest.mark.usefixtures("way")
def test_products_of_every_small_shape_equal_int64(generator):
    """One, two, odd and off-vector sizes of tokens, outputs and inputs; torch's own product is wrong for one input."""
    sizes = (1, 2, 3, 5, 16, 17)
    for tokens, outputs, inputs in itertools.product(sizes, sizes, (*sizes, 31, 33, 65)):
        q, weight = int8((tokens, inputs), generator), int8((outputs, inputs), generator)
        total = product.product(q, weight)
        assert torch.equal(total.long(), q.long() @ weight.long().t()), (tokens, outputs, inputs)
        one = torch.ones(1), torch.ones(outputs)
        y = k.gemm_w8a8(q, weight, *one)
        assert torch.equal(y.long(), q.long() @ weight.long().t()), (tokens, outputs, inputs)


def test_a_processor_whose_dot_products_are_wrong_is_named(processor, monkeypatch, generator):
    processor(avx_vnni=True)
    right = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda q, weight: right(q, weight).clamp(max=2**15))
    product._check_dot_products.cache_clear()
    with pytest.raises(RuntimeError, match="not exact on this processor; choose the backend"):
        product.product(int8((3, 64), generator), int8((5, 64), generator))
    product._check_dot_products.cache_clear()


@pytest.mark.parity("P5")
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("q_value", "w_value"), [(-128, -128), (-128, 127), (127, 127), (127, -128)]
)
def test_extremes_do_not_saturate(q_value, w_value):
    """Pairs of the largest products pass int16, all of them together come near int32."""
    q = torch.full((2, 131071), q_value, dtype=torch.int8)
    weight = torch.full((1, 131071), w_value, dtype=torch.int8)
    exact = q_value * w_value * 131071
    assert product.product(q, weight).tolist() == [[exact], [exact]]


def pair_weights(kind, generator):
    """Int8 weights [8, 61] of which pairs need no copies, some, or copies of copies."""
    weight = torch.randint(-64, 65, (8, 61), generator=generator, dtype=torch.int8)
    if kind != "none":
        weight[3, 8:10] = torch.tensor([127, 2], dtype=torch.int8)  # 129: one too many
        weight[5, 16:18] = torch.tensor([-128, -128], dtype=torch.int8)
    if kind == "twice":
        weight[2, 18:22] = 127  # 126 too many beside 126: two copies that would saturate
    return weight


@pytest.mark.parity("P5")
@pytest.mark.parametrize(
    ("kind", "copied"),
    [("none", [0, 0, 0]), ("some", [0, 8, 16]), ("twice", [0, 8, 16, 18, 20, 18, 18, 0, 0, 0, 0])],
)
def test_pairs_that_would_saturate_are_copied(kind, copied, generator):
    """The first copy, of input 0 with zero weights, makes the inputs even; so does the last 18. Eights are filled."""
    weight = pair_weights(kind, generator)
    grown, sources = pairs._with_copies(weight)
    assert sources.tolist() == copied
    assert grown.shape[1] == 61 + len(copied)
    assert grown.shape[1] % 8 == 0
    sums = grown[:, 0::2].int() + grown[:, 1::2]
    assert 255 * int(sums.abs().max()) < 2**15
    total = grown[:, :61].int()  # copies add up with the inputs they stand for
    total.index_add_(1, sources, grown[:, 61:].int())
    assert torch.equal(total, weight.int())
    q = int8((9, 61), generator)
    q[0], q[1] = 127, -128
    assert torch.equal(pairs.product(q, weight).long(), q.long() @ weight.long().t())


@pytest.mark.parametrize(
    ("copied", "in_features", "expected"),
    [([], 6, 0), ([0, 2, 4, 2], 6, 3), ([0, 2, 2], 6, 2), ([2, 4], 6, 0), ([0, 2, 4, 0], 5, 3)],
)
def test_leading_copies_of_every_second_input(copied, in_features, expected):
    assert pairs._every_second(torch.tensor(copied, dtype=torch.int64), in_features) == expected


@pytest.mark.parity("P5")
@pytest.mark.parametrize("inputs", [256, 257, 258, 259])
def test_random_weights_are_exact_whatever_they_grow_to(inputs, generator):
    """Rows that end within four inputs, which oneDNN pairs in another way: a pair of them could saturate unseen."""
    for outputs in (1, 6, 64):
        weight = (
            (torch.randn(outputs, inputs, generator=generator) * 40).clamp(-127, 127).to(torch.int8)
        )
        q = int8((3, inputs), generator)
        q[0], q[1] = 127, -128
        assert torch.equal(pairs.product(q, weight).long(), q.long() @ weight.long().t())


@pytest.mark.parity("P5")
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("columns", [512, 750, 770, 1166])
def test_no_block_of_onednn_starts_amid_a_pair(columns, tokens):
    """oneDNN halves 257 to 767 inputs: 750 became 2 * 375, and the second half paired other inputs than the first."""
    weight = torch.tensor([[1, 127], [-1, -127]], dtype=torch.int8).repeat(20, columns // 2)
    assert pairs._with_copies(weight)[0].shape[1] == columns + -columns % pairs.COLUMNS  # no copies
    q = torch.full(
        (tokens, columns), 127, dtype=torch.int8
    )  # another pairing, 127 + 1 + 127, would saturate
    assert torch.equal(pairs.product(q, weight).long(), q.long() @ weight.long().t())


def test_weights_grow_by_less_than_twice(generator):
    for value in (127, -128):
        grown, _ = pairs._with_copies(torch.full((2, 640), value, dtype=torch.int8))
        assert grown.shape[1] < 2 * 640 + 16
    normal = k.quantize_weight_w8(torch.randn(64, 640, generator=generator)).qweight
    assert pairs._with_copies(normal)[0].shape[1] <= 1.5 * 640 + 16


@pytest.mark.skipif(bool(cpu_features.int8_dot()), reason="int8 dot products never saturate")
def test_unguarded_pairs_are_refused(monkeypatch, generator):
    """Without copies the product is wrong here, and the check at the first use sees it."""
    none = torch.empty(0, dtype=torch.int64)
    monkeypatch.setattr(pairs, "_with_copies", lambda weight: (weight, none))
    with pytest.raises(
        RuntimeError, match="not exact on this processor; choose the backend 'reference'"
    ):
        pairs.product(int8((2, 60), generator), pair_weights("some", generator))


@pytest.mark.parity("P5")
def test_sums_above_fp32_come_from_parts(generator):
    """2048 products of 127 * 127 and more pass 2**24, where fp32 has no odd integers."""
    q, weight = (torch.full((1, 4099), 127, dtype=torch.int8) for _ in range(2))
    total = pairs.product(q, weight)
    assert total.dtype == torch.int32
    assert total.item() == 127 * 127 * 4099  # odd
    assert pairs.product(q[:, :64], weight[:, :64]).dtype == torch.float32


def test_changed_weights_are_prepared_anew(generator):
    q, weight = int8((2, 32), generator), int8((3, 32), generator)
    pairs.product(q, weight)
    weight[0] = 1
    assert torch.equal(pairs.product(q, weight).long(), q.long() @ weight.long().t())


@pytest.mark.parity("P5")
@pytest.mark.parametrize("kind", ["w8", "w4p"])
def test_inference_weights_are_not_prepared_at_every_call(kind, processor, monkeypatch, generator):
    processor()
    keep_copies(True)
    with torch.inference_mode():
        weight, *groups = weights(kind, 17, 96, generator)
    expanded = weight if kind == "w8" else packing.expand_w4p(weight, *groups)
    q = int8((5, 96), generator)
    monkeypatch.setattr(pairs, "_prepare", None)  # not callable
    total = product.product(q, weight, *groups)
    assert torch.equal(total.long(), q.long() @ expanded.long().t())


@pytest.mark.parity("P5")
@pytest.mark.parametrize("dot_products", [True, False])
@pytest.mark.parametrize("kind", ["w8", "w4p"])
def test_copies_of_weights_are_made_on_request_and_freed(kind, dot_products, processor, generator):
    """Int4 as int8: [17, 96] bytes. Pairs: at least as many. Int8 itself is what dot products read."""
    processor(avx_vnni=dot_products)
    weight, *groups = weights(kind, 17, 96, generator)
    expanded = weight if kind == "w8" else packing.expand_w4p(weight, *groups)
    q, before = int8((5, 96), generator), copied_bytes()
    expected = q.long() @ expanded.long().t()
    assert torch.equal(product.product(q, weight, *groups).long(), expected)
    assert copied_bytes() == before
    keep_copies(True)
    for _ in range(2):
        assert torch.equal(product.product(q, weight, *groups).long(), expected)
    least = 0 if dot_products and kind == "w8" else 17 * 96
    most = least if dot_products else 2 * 17 * 96
    assert least <= copied_bytes() - before <= most
    keep_copies(False)
    assert copied_bytes() == 0


@pytest.mark.parity("P5")
@pytest.mark.usefixtures("small_blocks", "way")
def test_expanded_products_equal_int64(generator):
    w = k.quantize_weight_w4p(torch.randn(17, 96, generator=generator), 32)
    q = int8((5, 96), generator)
    total = product.product(q, w.packed, w.group_scale, w.group_offset)
    assert torch.equal(total.long(), q.long() @ w.expand().long().t())


def epilogues(tokens, outputs, generator):
    """What a GEMM does with its sums, case by case: name -> argument."""
    samples = 2 if tokens % 2 == 0 else 1
    base = {
        "scale": torch.rand(tokens, generator=generator) / 100,
        "weight_scale": torch.rand(outputs, generator=generator) / 100,
    }
    one = {"scale": torch.rand(1, generator=generator) / 100}
    bias = {"bias": torch.randn(outputs, generator=generator)}
    zeros = torch.randint(-128, 128, (tokens,), generator=generator, dtype=torch.int32)
    weight_sum = {
        "weight_sum": torch.randint(-(10**5), 10**5, (outputs,), generator=generator).int()
    }
    table = {
        "bias": torch.randn(3, outputs, generator=generator),
        "bias_index": torch.randint(0, 3, (samples,), generator=generator),
    }
    branch = {
        "lora_x": torch.randn(tokens, 5, generator=generator).bfloat16(),
        "lora_up": torch.randn(outputs, 5, generator=generator).bfloat16(),
    }
    cases = {
        "per token": base,
        "per token, bias": base | bias,
        "static": base | one | bias | weight_sum | {"zero_point": zeros[:1]},
        "zero points per token": base | bias | weight_sum | {"zero_point": zeros},
        "bias table": base | table,
        "branch": base | branch,
        "everything": base | one | table | branch | weight_sum | {"zero_point": zeros[:1]},
    }
    return {name: dict.fromkeys(STAGES) | case for name, case in cases.items()}


STAGES = (
    "scale", "weight_scale", "bias", "zero_point", "weight_sum", "bias_index", "lora_x", "lora_up",
)  # fmt: skip
CASES = tuple(epilogues(2, 1, torch.Generator().manual_seed(0)))


def weights(kind, outputs, inputs, generator):
    """Codes, group scales and group offsets of `w8`, `w4p` or `w4g`."""
    if kind == "w8":
        return int8((outputs, inputs), generator), None, None
    if kind == "w4g":
        w = k.quantize_weight_w4g(torch.randn(outputs, inputs, generator=generator), 32)
        return w.packed, None, w.weight_zero
    w = k.quantize_weight_w4p(torch.randn(outputs, inputs, generator=generator), 32)
    return w.packed, w.group_scale, w.group_offset


def stages_of(kind, parts, case, tokens, generator):
    """Values of STAGES; real groups have their own weight scales, and sums that must be those of the codes."""
    packed, _, zero = parts
    stages = epilogues(tokens, len(packed), generator)[case]
    if kind == "w4g":
        w = k.W4G(packed, torch.rand(zero.shape, generator=generator) / 100, zero)
        sums = {} if stages["weight_sum"] is None else {"weight_sum": w.weight_sum()}
        stages = stages | {"weight_scale": w.scale} | sums
    return [stages[name] for name in STAGES]


@pytest.mark.parity("P7")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.usefixtures("small_blocks", "poisoned", "way")
def test_gemms_equal_the_reference_bit_for_bit(shape, case, out_dtype, generator):
    tokens, outputs, inputs = shape
    options = epilogues(tokens, outputs, generator)[case] | {"out_dtype": out_dtype}
    q = int8((tokens, inputs), generator)
    weight, *_ = weights("w8", outputs, inputs, generator)
    expected = reference.gemm_w8a8(q, weight, **options)
    assert torch.equal(_cpu.gemm_w8a8(q, weight, **options), expected)
    packed, *groups = weights("w4p", outputs, inputs, generator)
    int4 = (q, packed, options.pop("scale"), *groups)
    expected = reference.gemm_w4a8(*int4, **options)
    assert torch.equal(_cpu.gemm_w4a8(*int4, **options), expected)
    parts = weights("w4g", outputs, inputs, generator)
    scale, weight_scale, *stages = stages_of("w4g", parts, case, tokens, generator)
    arguments = (q, parts[0], scale, weight_scale, parts[2], *stages[:3], out_dtype, *stages[3:])
    expected = reference.gemm_w4a8_per_group(*arguments)
    assert torch.equal(_cpu.gemm_w4a8_per_group(*arguments), expected)


@pytest.mark.parity("P5")
def test_the_largest_real_groups_are_exact():
    """All extremes: 255 * 15 * 4389 passes 2**24 by an odd number; fp32 would lose the sums on the way."""
    group = 4390
    assert 255 * 15 * (group - 1) > 2**24
    codes = torch.full((1, group), 15, dtype=torch.uint8)
    codes[0, 0] = 0
    q = torch.full((1, group), 127, dtype=torch.int8)
    zero = torch.zeros(1, 1, dtype=torch.uint8)
    zero_point = torch.tensor([-128], dtype=torch.int32)
    sums = k.W4G(k.pack_int4(codes), torch.ones(1, 1), zero).weight_sum()
    arguments = (
        q,
        k.pack_int4(codes),
        torch.ones(1),
        torch.ones(1, 1),
        zero,
        None,
        zero_point,
        sums,
    )
    y = _cpu.gemm_w4a8_per_group(*arguments, torch.float32)
    assert y.item() == torch.tensor(255 * 15 * (group - 1)).float().item()


@pytest.mark.parametrize("kind", ["w8", "w4p", "w4g"])
@pytest.mark.usefixtures("small_blocks", "poisoned", "way")
def test_layers_of_one_input_equal_the_reference_bit_for_bit(kind, generator):
    tokens, inputs, layers = 70, 96, []
    for outputs in (40, 7):
        parts = weights(kind, outputs, inputs, generator)
        layers.append((*parts, *stages_of(kind, parts, "everything", tokens, generator)))
    codes, group_scales, group_offsets, scales, steps, biases, zeros, sums, index, *_ = (
        [] if each[0] is None else list(each) for each in zip(*layers, strict=True)
    )
    shared = int8((tokens, inputs), generator), codes, group_scales, group_offsets, scales[0]
    for dtype in DTYPES:
        arguments = (*shared, steps, biases, zeros[0], sums, index[0], dtype)
        expected = reference_fused.gemm_many(*arguments)
        for got, right in zip(_cpu.gemm_many(*arguments), expected, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parity("P7")
@pytest.mark.parametrize("kind", ["w8", "w4p", "w4g"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_blocks", "poisoned", "way")
def test_fused_gemms_equal_the_reference_bit_for_bit(kind, case, generator):
    tokens, outputs, inputs = 70, 40, 96
    parts = weights(kind, outputs, inputs, generator)
    stages = stages_of(kind, parts, case, tokens, generator)
    parts = int8((tokens, inputs), generator), *parts
    gates = (torch.randn(5, outputs, generator=generator), None)
    for dtype, gate in itertools.product(DTYPES, gates):
        residual = torch.randn(tokens, outputs, generator=generator).to(dtype)
        before = residual.clone()
        got = _cpu.gemm_residual(*parts, residual, gate, *stages)
        assert torch.equal(got, reference_fused.gemm_residual(*parts, residual, gate, *stages))
        assert torch.equal(residual, before)
    static = torch.tensor([0.0173]), torch.tensor([-9], dtype=torch.int32)
    for smooth_inv in (None, torch.rand(outputs, generator=generator) + 0.5):
        got = _cpu.gemm_gelu_quantize(*parts, *static, smooth_inv, *stages)
        expected = reference_fused.gemm_gelu_quantize(*parts, *static, smooth_inv, *stages)
        # one thread: where torch splits a tensor, its GELU rounds the ends of the parts another way
        assert torch.equal(got, expected) or torch.get_num_threads() > 1
        assert (got.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["w8", "w4p", "w4g"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_blocks", "poisoned", "way")
def test_queries_keys_and_values_equal_the_reference_bit_for_bit(kind, case, generator):
    tokens, outputs, inputs, heads = 70, 40, 96, 5
    three = [weights(kind, outputs, inputs, generator) for _ in range(3)]
    found = [stages_of(kind, parts, case, tokens, generator) for parts in three]
    (scale, _, bias, zero_point, weight_sum, bias_index, *_), *_ = found
    _, weight_scales, biases, _, weight_sums, *_ = map(list, zip(*found, strict=True))
    arguments = (
        int8((tokens, inputs), generator),
        *([part for part in parts if part is not None] for parts in zip(*three, strict=True)),
        [torch.rand(heads, generator=generator) / 10 + 0.01 for _ in range(3)], None, 7, heads,
        scale, weight_scales, [] if bias is None else biases, zero_point,
        [] if weight_sum is None else weight_sums, bias_index,
    )  # fmt: skip
    expected = reference_fused.gemm_qkv_quantize(*arguments)
    for mine, theirs in zip(_cpu.gemm_qkv_quantize(*arguments), expected, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()


@pytest.mark.usefixtures("way")
def test_no_tokens_give_none(generator):
    weight, options = int8((3, 32), generator), epilogues(0, 3, generator)["per token"]
    y = _cpu.gemm_w8a8(int8((0, 32), generator), weight, **options, out_dtype=torch.bfloat16)
    assert (y.shape, y.dtype) == ((0, 3), torch.bfloat16)


@pytest.mark.parametrize("feature", ["amx_int8", "avx512_vnni", "avx_vnni"])
def test_int8_dot_products_choose_the_cpu_backend(feature, processor):
    processor(avx2=False)
    assert {k.backend_of(op, "cpu") for op in backend.CPU_OPS} == {"reference"}
    processor(**{feature: True})
    assert {k.backend_of(op, "cpu") for op in backend.CPU_OPS} == {"cpu"}
    assert cpu_features.describe() == f"Some CPU with avx2, {feature}"
    assert cpu_features.int8_gemm() == "dot products"
    assert k.backend_of("quantize_per_token", "cpu") == "reference"
    assert k.backend_of("gemm_w8a8", "cuda") == "triton"
    k.choose_backend("reference", "cpu")
    assert k.backend_of("gemm_w8a8", "cpu") == "reference"
    assert k.backend_of("gemm_w8a8", "cuda") == "triton"
    k.choose_backend("cpu", "cpu")
    assert k.backend_of("gemm_w8a8", "cpu") == "cpu"


@pytest.mark.parametrize("feature", ["avx2", "avx512_f"])
def test_pairs_choose_the_cpu_backend_where_torch_has_onednn(feature, processor, monkeypatch):
    processor(**{"avx2": False, feature: True})
    assert cpu_features.int8_gemm() == "pairs"
    assert {k.backend_of(op, "cpu") for op in backend.CPU_OPS} == {"cpu"}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert {k.backend_of(op, "cpu") for op in backend.CPU_OPS} == {"reference"}


def test_the_cpu_backend_is_refused_on_a_processor_without_int8_kernels(processor):
    processor(avx2=False)
    k.choose_backend("reference", "cpu")
    sentence = (
        r"'cpu' needs torch with oneDNN on a processor with one of amx_int8, avx512_vnni, avx_vnni, avx512_f, "
        r"avx2, and this is Some CPU with no known vector instructions, no int8 dot product; take 'auto' or"
    )
    with pytest.raises(ValueError, match=sentence):
        k.choose_backend("cpu", "cpu")
    with pytest.raises(ValueError, match="'cpu' needs tensors on the CPU, and these are on cuda:0"):
        k.choose_backend("cpu", "cuda:0")
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors, and these are on cpu"):
        k.choose_backend("triton", "cpu")
    with pytest.raises(ValueError, match="must be one of auto, reference, cpu, triton, got 'fast'"):
        k.choose_backend("fast", "cpu")
    assert backend._reference_on == {"cpu"}


def test_the_reference_can_be_chosen_on_cuda_but_not_for_attention(processor):
    processor()
    k.choose_backend("reference", "cuda:1")
    assert k.backend_of("gemm_w4a8", "cuda") == "reference"
    assert k.backend_of("attention_qk_int8_pv_int8", "cuda") == "triton"
    assert (
        backend.implementation("gemm_w8a8", torch.device("cuda"), reference.gemm_w8a8)
        is reference.gemm_w8a8
    )
    k.choose_backend("auto", "cuda")
    assert k.backend_of("gemm_w4a8", "cuda") == "triton"


def test_ops_run_what_backend_of_says(processor, monkeypatch, generator):
    """Each op takes its own function, the compiled one too; results do not tell the backends apart."""
    ran = []
    for op in backend.CPU_OPS:
        run = getattr(_cpu, op)
        monkeypatch.setattr(_cpu, op, lambda *a, op=op, run=run: ran.append(op) or run(*a))
    q, w8 = int8((4, 64), generator), k.quantize_weight_w8(torch.randn(3, 64))
    w4, scale = k.quantize_weight_w4p(torch.randn(3, 64), 32), torch.rand(4)
    w4g = k.quantize_weight_w4g(torch.randn(3, 64), 32)
    out = {"out_scale": torch.ones(1), "out_zero_point": torch.zeros(1, dtype=torch.int32)}
    calls = {
        "gemm_w8a8": lambda: k.gemm_w8a8(q, w8.qweight, scale, w8.scale),
        "gemm_w4a8": lambda: k.gemm_w4a8(
            q, w4.packed, scale, w4.group_scale, w4.group_offset, w4.scale
        ),
        "gemm_w4a8_per_group": lambda: k.gemm_w4a8_per_group(
            q, w4g.packed, scale, w4g.scale, w4g.weight_zero
        ),
        "gemm_residual": lambda: k.gemm_residual(
            q, w4, scale, residual=torch.ones(4, 3), gate=torch.ones(1, 3)
        ),
        "gemm_gelu_quantize": lambda: k.gemm_gelu_quantize(q, w8, scale, **out),
        "gemm_many": lambda: torch.stack(k.gemm_many(q, (w8, w8), scale)),
        "gemm_qkv_quantize": lambda: torch.stack(
            k.gemm_qkv_quantize(
                q, (w4,) * 3, scale, batch=2, heads=1, head_scales=(torch.ones(1),) * 3
            )
        ),
    }
    assert set(calls) == backend.CPU_OPS
    for op, call in calls.items():
        processor(avx2=False)
        expected = call()
        assert ran == []
        processor(avx_vnni=True)
        for run in (call, torch.compile(call, backend="eager", fullgraph=True)):
            assert torch.equal(run(), expected)
            assert ran == [op]
            ran.clear()
    torch.compiler.reset()


@pytest.mark.usefixtures("way")
def test_the_number_of_threads_does_not_show(generator):
    tokens, outputs, inputs = 96, 400, 64  # above torch's grain of 2**15 elements
    options = epilogues(tokens, outputs, generator)["everything"]
    (
        options.pop("lora_x"),
        options.pop("lora_up"),
    )  # a float product, which torch may sum in another order
    options |= {"q": int8((tokens, inputs), generator), "out_dtype": torch.float32}
    weight, before, results = int8((outputs, inputs), generator), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results += [
                run(weight=weight, **options) for run in (_cpu.gemm_w8a8, reference.gemm_w8a8)
            ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
