"""States of a model that other tools leave, at the door of the converters: one sentence each, before any work."""

import tempfile

import accelerate
import diffusers
import pytest
import torch

from ditq_converters import Recipe, calibrate, convert, make_plan
from ditq_converters.models.open import open_model


def dit():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval().requires_grad_(False)  # fmt: skip


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=48, axes_dims_rope=(4, 6, 6),
    ).eval().requires_grad_(False)  # fmt: skip


def changed(model, method, *args, **kwargs):
    getattr(model, method)(*args, **kwargs)
    return model


def with_adapter():
    peft = pytest.importorskip("peft")
    return changed(flux(), "add_adapter", peft.LoraConfig(r=2, target_modules=["to_q"]))


def offloaded():
    model = dit()
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def on_disk():
    model = dit()
    accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device="cpu")
    return model


def in_groups():
    return changed(
        flux(), "enable_group_offload", onload_device=torch.device("cpu"), offload_type="leaf_level"
    )


STATES = {
    "adapter": (with_adapter, "has an adapter attached; call fuse_lora"),
    "fused adapter": (lambda: changed(with_adapter(), "fuse_lora"), "has a fused adapter"),
    "offloaded": (offloaded, "is offloaded"),
    "on disk": (on_disk, "is offloaded"),
    "in groups": (in_groups, "is offloaded"),
    "fp8": (
        lambda: changed(dit(), "enable_layerwise_casting", storage_dtype=torch.float8_e4m3fn),
        "is cast to fp8",
    ),
    "wrapped": (lambda: torch.compile(dit(), backend="eager"), "is wrapped by torch.compile"),
    "compiled": (lambda: changed(dit(), "compile", backend="eager"), "is compiled"),
    "qkv": (lambda: changed(flux(), "fuse_qkv_projections"), "has fused QKV projections"),
    "packed": (lambda: convert(dit(), Recipe("linear"), quiet=True), "is quantized already"),
    "meta": (lambda: dit().to("meta"), "has no weights"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_has_one_sentence_and_nothing_is_done(name, tmp_path):
    make, sentence = STATES[name]
    model = make()
    with pytest.raises(ValueError, match=rf"convert: the \w+2DModel {sentence}"):
        convert(model, Recipe("linear"), out=tmp_path / "out", quiet=True)
    with pytest.raises(ValueError, match=rf"calibrate: the \w+2DModel {sentence}"):
        calibrate(model, tmp_path / "stats", quiet=True)
    if name != "meta":  # a plan needs shapes alone
        with pytest.raises(ValueError, match=rf"make_plan: the \w+2DModel {sentence}"):
            make_plan(model)
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="dict has no transformer; expected a diffusers pipeline"):
        convert({}, Recipe("linear"), quiet=True)


def test_an_adapter_that_was_fused_and_taken_off_is_in_the_weights():
    model = changed(with_adapter(), "fuse_lora")
    model.unload_lora()
    convert(model, Recipe("linear"), quiet=True)


def test_the_only_variant_is_taken_and_of_two_none(tmp_path):
    model = dit()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    opened = open_model(str(tmp_path))
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    model.save_pretrained(tmp_path, variant="bf16")
    with pytest.raises(ValueError, match="holds the variants bf16 and fp16 and no other weights"):
        open_model(str(tmp_path))
    dit().save_pretrained(tmp_path)
    open_model(str(tmp_path))  # the plain ones
