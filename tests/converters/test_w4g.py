"""w4g through the whole product: the demo converts, reloads, samples and reports; groups and branches run."""

import torch
from diffusers import DiTPipeline

from ditq_converters import Recipe, calibrate, convert, open_model
from ditq_runtime import execution_report


def test_the_demo_converts_and_samples(tmp_path):
    source = open_model("demo:digits")
    convert(source, Recipe("linear", "w4g", group_size=32), out=tmp_path / "out", quiet=True)
    pipe = DiTPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    images = [
        model(
            [3, 7],
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        for model in (source, pipe)
    ]
    error = images[1] - images[0]
    assert 0 < (error**2).mean() < 0.1 * images[0].var()  # 4 bits: another image of the same digits
    report = execution_report(pipe.transformer)
    ran = {layer.op for layer in report.layers if layer.weights == "w4g"}
    assert ran == {
        "adaln_quantize + gemm_w4a8_per_group",
        "gemm_w4a8_per_group",
        "quantize_per_token + gemm_residual",
        "gelu_quantize + gemm_residual",
        "linear_w4_per_group",
    }
    assert report.totals["fused_blocks"] == len(pipe.transformer.transformer_blocks)
    assert report.totals["integer_flops_share"] > 0.9


def test_groups_of_timesteps_and_low_rank_branches_run(make_pipeline, inputs, tmp_path):
    """HTG's bias tables and a branch of rank 4 beside the same codes; what ran is what the scheme says."""
    pipe = make_pipeline()
    stats = calibrate(pipe, tmp_path, steps=4, samples=2, quiet=True)
    batch = inputs(pipe.transformer)
    with torch.no_grad():
        truth = pipe.transformer(**batch).sample
        errors = []
        for rank in (0, 32):
            recipe = Recipe("htg", "w4g", "static", num_groups=2, lora_rank=rank, symmetric=True)
            packed = convert(pipe, recipe, stats, quiet=True)
            layer = packed.transformer_blocks[0].attn1.to_q
            assert (layer.format.groups, layer.format.lora_rank) == (2, rank)
            assert bool((layer.weight_zero == 8).all())
            errors.append(float((packed(**batch).sample - truth).norm() / truth.norm()))
            assert execution_report(packed).totals["integer_linears"] == 12
    assert errors[1] < errors[0] < 0.5  # half of the rank takes most of what 4 bits lose
