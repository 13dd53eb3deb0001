"""The debug switch for NaN: off, a static layer makes it a number; on, it is refused, fused or not."""

import pytest
import torch

from ditq_runtime.layers import check_nan


def spoil(model):
    """Let the first block get a NaN, in one channel of one token, whatever it is given."""

    def put(block, args):
        rows = args[0].clone()
        rows[0, 1, 5] = float("nan")
        return (rows, *args[1:])

    return model.transformer_blocks[0].ff.register_forward_pre_hook(put)


def test_off_a_static_layer_hides_a_nan(packed_folder, load):
    model = load(packed_folder("w8_static"))
    site = model.transformer_blocks[0].ff.net[2].site
    assert site.is_static
    rows = torch.randn(4, site.in_features)
    rows[1, 5] = float("nan")
    codes = site(rows)
    assert codes.q.dtype == torch.int8
    assert torch.isfinite(codes.scale).all()


def test_on_it_is_refused_by_the_names_of_the_readers(packed_folder, load, forward, monkeypatch):
    monkeypatch.setattr(check_nan, "ON", True)
    model = load(packed_folder("w8_static"))
    expected = forward(model)
    monkeypatch.setattr(check_nan, "ON", False)
    assert torch.equal(
        forward(load(packed_folder("w8_static"))), expected
    )  # to look changes no bit
    monkeypatch.setattr(check_nan, "ON", True)
    hook = spoil(model)
    with pytest.raises(
        ValueError, match=r"NaN in the input .* of the site of .*transformer_blocks"
    ):
        forward(model)
    hook.remove()
    for layer in (model.transformer_blocks[1].ff.net[2], model.transformer_blocks[0].attn1.to_q):
        site = layer.site
        rows = torch.zeros(3, site.in_features)
        rows[2, 0] = float("nan")
        for quantize in (site, site.of_gelu):
            with pytest.raises(ValueError, match=r"DITQ_CHECK_NAN: NaN in the input \[3, "):
                quantize(rows)


def test_on_fused_blocks_look_too(packed_folder, load, forward, monkeypatch):
    model = load(packed_folder("w8_static"))
    monkeypatch.setattr(check_nan, "ON", True)
    model.transformer_blocks[0].attn1.to_out[0].bias.data[3] = float("nan")  # in a fused block
    with pytest.raises(ValueError, match="DITQ_CHECK_NAN: NaN in the input"):
        forward(model)
