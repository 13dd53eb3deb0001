"""Scheme and LayerFormat: what they store, and the sentences with which they refuse."""

import json

import pytest
import torch

from ditq_runtime import CheckpointError, LayerFormat, Scheme
from ditq_runtime.format.site import SiteFormat

FORMATS = {
    "w8_token": LayerFormat("w8", "token"),
    "w4p_static": LayerFormat("w4p", "static", group_size=32, bias=False),
    "kept": LayerFormat("fp32", "none"),
}
LAYERS = {"blocks.0.a": "w8_token", "blocks.0.b": "w4p_static", "blocks.1.a": "kept"}
SITES = {
    "blocks.0.a": SiteFormat(("blocks.0.a",), "token", smooth=True),
    "blocks.0.out": SiteFormat(
        ("blocks.0.b",), "static", "value", True, 2, True, {"blocks.0.v": (0,)}
    ),
}
SCHEME = Scheme("DiTTransformer2DModel", True, FORMATS, LAYERS, SITES)


def _stored(**changes):
    return {**SCHEME.to_dict(), **changes}


def _format(**changes):
    entry = {"weights": "w8", "activations": "token", "group_size": None}
    more = {"bias": True, "groups": 1, "lora_rank": 0}
    return {**entry, **more, **changes}


def _site(**changes):
    entry = {"readers": ["blocks.0.a"], "activations": "token", "place": "quantizer"}
    return {**entry, "smooth": True, "shifts": 0, **changes}


def test_a_scheme_survives_json():
    again = Scheme.from_dict(json.loads(json.dumps(SCHEME.to_dict())))
    assert again == SCHEME
    assert again.format_of("blocks.0.b") == FORMATS["w4p_static"]


def test_the_stored_form_is_what_the_format_document_says():
    assert SCHEME.to_dict() == {
        "architecture": "DiTTransformer2DModel",
        "shared_embedder": True,
        "formats": {
            "w8_token": _format(),
            "w4p_static": _format(weights="w4p", activations="static", group_size=32, bias=False),
            "kept": _format(weights="fp32", activations="none"),
        },
        "layers": LAYERS,
        "sites": {
            "blocks.0.a": _site(),
            "blocks.0.out": {
                "readers": ["blocks.0.b"],
                "activations": "static",
                "place": "value",
                "smooth": True,
                "shifts": 2,
                "rest": True,
                "producers": {"blocks.0.v": [0]},
            },
        },
        "timestep": "timestep",
        "timestep_freq": "diffusers",
    }


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"weights": "w5"}, r"weights must be one of .*'w8', 'w4p', 'w4g', 'fp32'.*got 'w5'"),
        ({"weights": ["w8"]}, r"weights must be of type str, got \['w8'\]"),
        ({"activations": "int8"}, r"activations must be one of .*'token'.*got 'int8'"),
        (
            {"weights": "w4p"},
            r"group_size belongs to w4p and w4g and only there, got weights='w4p', .*None",
        ),
        (
            {"group_size": 32},
            r"group_size belongs to w4p and w4g and only there, got weights='w8'.*=32",
        ),
        ({"weights": "fp32"}, "fp32 weights cannot have quantized activations"),
        ({"groups": 0}, "groups must be a count of at least 1 and at most 65536, got 0"),
        ({"groups": 10**30}, "groups must be a count of .*at most 65536, got 1000"),
        ({"lora_rank": -1}, "lora_rank must be a count of at least 0"),
        ({"groups": True}, "groups must be of type int, got True"),
    ],
)
def test_formats_that_no_op_runs_are_refused(fields, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        LayerFormat(**_format(**fields))
    with pytest.raises(CheckpointError, match=sentence):
        Scheme.from_dict(_stored(formats={**SCHEME.to_dict()["formats"], "x": _format(**fields)}))


@pytest.mark.parametrize(
    ("stored", "sentence"),
    [
        (None, "scheme: expected an object, got NoneType"),
        ([], "scheme: expected an object, got list"),
        (
            {},
            r"scheme: missing keys \['architecture', 'formats', 'layers', 'shared_embedder', 'sites', 'time",
        ),
        (_stored(extra=1), r"scheme: missing keys \[\], unknown keys \['extra'\]"),
        (_stored(formats=[]), "scheme: formats must be of type dict"),
        (_stored(layers=[]), "scheme: layers must be of type dict"),
        (_stored(formats={"f": 3}), r"scheme.formats.f: expected an object, got int"),
        (_stored(formats={"f": {}}), r"scheme.formats.f: missing keys \['activations', 'bias'"),
        (_stored(formats={"f": _format(odd=1)}), r"scheme.formats.f: .*unknown keys \['odd'\]"),
        (_stored(layers={"a": "w3"}), r"layers name formats that are not defined: \['w3'\]"),
        (_stored(layers={"a": ["kept"]}), "scheme: layers: a must be of type str"),
        (_stored(timestep_freq="dot"), "timestep_freq must be one of"),
        (_stored(timestep=None), "timestep must be of type str, got None"),
        (_stored(sites=[]), "scheme: sites must be of type dict"),
        (
            _stored(attention={"a": {"values": "int8"}}),
            r"scheme.attention.a: missing keys \['scales",
        ),
        (_stored(layers={}), "no layer is listed, so nothing would be quantized"),
    ],
)
def test_malformed_schemes_are_refused(stored, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        Scheme.from_dict(stored)


@pytest.mark.parametrize(
    "stored",
    [
        _stored(shared_embedder="false"),
        _stored(architecture=3),
        _stored(formats={"1": _format()}, layers={"a": 1}),
        _stored(formats={"f": _format(bias="no")}, layers={"a": "f"}),
        _stored(formats={"f": _format(groups=1.0)}, layers={"a": "f"}),
    ],
    ids=["embedder", "architecture", "format name", "bias", "groups"],
)
def test_values_of_another_type_are_refused_and_not_guessed(stored):
    with pytest.raises(CheckpointError):
        Scheme.from_dict(stored)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"readers": []}, "readers must be names of linears, each once, and at least one"),
        ({"readers": ["blocks.0.a"] * 2}, "readers must be names of linears, each once"),
        ({"readers": "blocks.0.a"}, "readers must be of type list"),
        ({"readers": [3]}, "readers: an entry must be of type str, got 3"),
        ({"readers": ["blocks.0.c"]}, "site blocks.0.a is read by blocks.0.c, which is no layer"),
        ({"readers": ["blocks.1.a"]}, "site blocks.0.a is read by blocks.1.a, which is no layer"),
        ({"readers": ["blocks.0.a", "blocks.0.b"]}, "blocks.0.b reads two sites"),
        ({"activations": "static"}, r"has static activations, its readers \['token'\]"),
        ({"activations": "none"}, "nothing may be left to a quantizer"),
        ({"activations": "int8"}, "activations must be one of"),
        ({"place": "shelf"}, "place must be one of"),
        ({"place": "norm", "producers": {"blocks.0.n": [0]}}, "in a norm scales no rows"),
        ({"place": "value", "producers": {"blocks.0.v": [-1]}}, "blocks.0.v must list where"),
        ({"place": "value", "producers": {"blocks.0.v": 0}}, "blocks.0.v must be of type list"),
        ({"rest": True}, "rest belongs to a fold"),
        ({"shifts": -1}, "shifts must be a count"),
        ({"shifts": 10**9}, "shifts must be a count"),
        ({"smooth": 1}, "smooth must be of type bool"),
        ({"odd": 1}, r"unknown keys \['odd'\]"),
    ],
)
def test_damaged_sites_are_refused(changes, sentence):
    sites = {**SCHEME.to_dict()["sites"], "blocks.0.a": _site(**changes)}
    with pytest.raises(CheckpointError, match=sentence):
        Scheme.from_dict(_stored(sites=sites))


def test_an_integer_layer_without_a_site_is_refused():
    sites = {"blocks.0.out": SCHEME.to_dict()["sites"]["blocks.0.out"]}
    with pytest.raises(CheckpointError, match=r"blocks.0.a has quantized .* reads no site"):
        Scheme.from_dict(_stored(sites=sites))


def test_stored_tensors_of_sites():
    fp32, int32 = torch.float32, torch.int32
    ends = {"act_scale": (fp32, (1,)), "act_zero": (int32, (1,))}
    folded = {"scale": (fp32, (8,)), "fold_shift": (fp32, (2, 8))}
    assert SITES["blocks.0.out"].tensors(8) == {"smooth_inv": (fp32, (8,)), **ends, **folded}
    applied = SiteFormat(("a",), "token_asym", smooth=True, shifts=3)
    assert applied.tensors(8) == {"smooth_inv": (fp32, (8,)), "shift": (fp32, (3, 8))}
    assert SiteFormat(("a",), "token").tensors(8) == {}


@pytest.mark.parametrize("size", [16, 48, 96, 256])
def test_group_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(CheckpointError, match=r"multiple of 32 that divides the 128 inputs, got"):
        LayerFormat("w4p", "token", group_size=size).tensors(128, 8)


@pytest.mark.parametrize(
    ("layer_format", "ops"),
    [
        (LayerFormat("w8", "token"), ("quantize_per_token", "gemm_w8a8")),
        (LayerFormat("w8", "static"), ("quantize_static", "gemm_w8a8")),
        (LayerFormat("w8", "token_asym"), ("quantize_per_token", "gemm_w8a8")),
        (LayerFormat("w4p", "token", 32), ("quantize_per_token", "gemm_w4a8")),
        (LayerFormat("w4p", "static", 32), ("quantize_static", "gemm_w4a8")),
        (LayerFormat("w8", "none"), ("linear_w8",)),
        (LayerFormat("w4p", "none", 32), ("linear_w4",)),
        (LayerFormat("w4g", "token", 32), ("quantize_per_token", "gemm_w4a8_per_group")),
        (LayerFormat("w4g", "static", 32), ("quantize_static", "gemm_w4a8_per_group")),
        (LayerFormat("w4g", "none", 32), ("linear_w4_per_group",)),
        (LayerFormat("fp32", "none"), ()),
    ],
)
def test_ops_of_every_format(layer_format, ops):
    assert layer_format.ops == ops
    assert layer_format.integer_gemm == (len(ops) == 2)


def test_stored_tensors_of_the_fullest_format():
    stored = LayerFormat("w4p", "static", group_size=64).tensors(128, 6)
    assert stored == {
        "weight": (torch.uint8, (6, 64)),
        "weight_scale": (torch.float32, (6,)),
        "group_scale": (torch.uint8, (6, 2)),
        "group_offset": (torch.int8, (6, 2)),
        "weight_sum": (torch.int32, (6,)),
        "bias": (torch.float32, (6,)),
    }


def test_stored_tensors_of_real_groups():
    assert LayerFormat("w4g", "token_asym", group_size=64, bias=False).tensors(128, 6) == {
        "weight": (torch.uint8, (6, 64)),
        "weight_scale": (torch.float32, (6, 2)),
        "weight_zero": (torch.uint8, (6, 2)),
        "weight_sum": (torch.int32, (6, 2)),
    }
    one = LayerFormat("w4g", "token", group_size=48, bias=False).tensors(48, 6)  # all inputs
    assert one["weight_scale"] == (torch.float32, (6, 1))
    assert LayerFormat("w4g", "token", group_size=48).name == "w4g48_token"


@pytest.mark.parametrize(("inputs", "size"), [(128, 48), (96, 64), (33, 33)])
def test_real_groups_that_do_not_fit_are_refused(inputs, size):
    with pytest.raises(CheckpointError, match=rf"that divides the {inputs} inputs, got {size}"):
        LayerFormat("w4g", "token", group_size=size).tensors(inputs, 8)


def test_stored_tensors_of_the_barest_formats():
    assert LayerFormat("w8", "token", bias=False).tensors(5, 3) == {
        "weight": (torch.int8, (3, 5)),
        "weight_scale": (torch.float32, (3,)),
    }
    assert LayerFormat("fp32", "none", bias=False).tensors(5, 3) == {
        "weight": (torch.float32, (3, 5))
    }
