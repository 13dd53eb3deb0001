"""Whether torch multiplies int8 faster than fp32 on this processor, as the `cpu` backend needs."""

import torch

# sums of int8 products in int32, without the detour over int16 that saturates
INT8_DOT = ("amx_int8", "avx512_vnni", "avx_vnni")
PAIRS = (
    "avx512_f",
    "avx2",
)  # oneDNN has int8 kernels for these too; they need `_cpu.pairs` to be exact
VECTORS = (*PAIRS, "neon")  # widest first


def int8_dot() -> str:
    """The instructions of `INT8_DOT` that this processor has, such as "amx_int8 + avx512_vnni"; empty: none.

    Torch asks the processor on the first call and remembers.
    """
    found = torch.cpu.get_capabilities()
    return " + ".join(name for name in INT8_DOT if found.get(name))


def int8_gemm() -> str:
    """How torch multiplies int8 here: "dot products", "pairs" (see `_cpu.pairs`), or "" if not faster than fp32."""
    if int8_dot():
        return "dot products"
    found = torch.cpu.get_capabilities()
    has_pairs = torch.backends.mkldnn.is_available() and any(found.get(name) for name in PAIRS)
    return "pairs" if has_pairs else ""


def describe() -> str:
    """This processor in a phrase, such as "AMD EPYC with avx2, no int8 dot product"."""
    found = torch.cpu.get_capabilities()
    name = found.get("cpu_name") or found.get("architecture") or "an unknown processor"
    vectors = next((name for name in VECTORS if found.get(name)), "no known vector instructions")
    return f"{name} with {vectors}, {int8_dot() or 'no int8 dot product'}"
