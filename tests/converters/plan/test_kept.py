"""What stays float, stored in bf16."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

from ditq_converters import convert, make_plan
from ditq_converters.streaming.opening import open_in_pieces

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(make_dit, tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    model = make_dit()
    model.save_pretrained(root / "float")
    for name in ("fp32", "bf16"):
        plan = make_plan(model, method="linear", kept_dtype=name, keep=("*.0.attn1.to_q",))
        convert(model, plan, out=root / name, quiet=True)
    plan = make_plan(model, method="linear", kept_dtype="bf16", keep=("*.0.attn1.to_q",))
    convert(open_in_pieces(root / "float", 2**40), plan, out=root / "pieces", quiet=True)
    return root


def test_integers_and_scales_are_the_same_and_floats_are_rounded(folders):
    full, half = (load_file(folders / name / WEIGHTS) for name in ("fp32", "bf16"))
    assert full.keys() == half.keys()
    rounded = {name for name, tensor in half.items() if tensor.dtype == torch.bfloat16}
    assert "pos_embed.proj.weight" in rounded
    assert (
        "transformer_blocks.0.attn1.to_q.weight" not in rounded
    )  # a layer of the checkpoint's own
    for name, tensor in half.items():
        expected = full[name].bfloat16() if name in rounded else full[name]
        assert torch.equal(tensor, expected), name


def test_in_pieces_it_has_the_same_bytes(folders):
    assert (folders / "pieces" / WEIGHTS).read_bytes() == (folders / "bf16" / WEIGHTS).read_bytes()


def test_it_runs_in_bf16(folders, inputs):
    loaded = DiTTransformer2DModel.from_pretrained(folders / "bf16", torch_dtype=torch.bfloat16)
    batch = inputs(loaded)
    with torch.no_grad():
        output = loaded(**batch).sample
    assert output.dtype == torch.bfloat16
    assert bool(torch.isfinite(output).all())
