"""The CPU table: every precision of a step runs on one small model, in the packed formats it names."""

import pytest
import torch

import ditq_kernels as k
from ditq_bench import cpu
from ditq_kernels.launch.prepared import keeps_copies
from ditq_runtime import QuantLinear

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 1,
    "sample_size": 4, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("dot_products", "copies"),
    [
        (True, ["ditq W4A8, copies kept"]),
        (False, ["ditq W8A8, copies kept", "ditq W4A8, copies kept"]),
    ],
)
def test_a_step_at_each_precision(processor, dot_products, copies):
    processor(avx_vnni=dot_products)
    rows = cpu.steps(TINY, 1, "wall")
    assert [row["candidate"] for row in rows] == [
        "torch fp32", "torch bf16", "ditq W8A8", "ditq W4A8", *copies,
    ]  # fmt: skip
    assert all(row.keys() == set(cpu.FIELDS) for row in rows)
    backend = k.backend_of("gemm_w8a8", "cpu")
    assert [row["backend"] for row in rows] == ["torch", "torch", *[backend] * (2 + len(copies))]
    assert float(rows[0]["speedup_over_fp32"]) == float(rows[1]["speedup_over_bf16"]) == 1
    sizes = [row["weight_bytes"] for row in rows]
    assert sizes[0] == 2 * sizes[1] > sizes[2] > sizes[3]
    assert all(kept > plain for kept, plain in zip(sizes[4:][::-1], sizes[3:1:-1], strict=False))
    assert not keeps_copies()


def test_random_codes_have_the_spread_of_random_weights():
    for weights in cpu.PACKED.values():
        model = cpu._random(TINY, weights)
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert len(layers) >= 7  # modulation, q, k, v, out, fc1, fc2
        for layer in layers:
            spread = layer.dequantized_weight().std() * layer.in_features**0.5
            assert abs(spread / cpu.SPREAD - 1) < 0.05
            assert torch.isfinite(layer.weight_scale).all()
