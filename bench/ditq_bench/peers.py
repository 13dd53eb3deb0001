"""Other backends on the demo model, as far as they are installed: bytes and SQNR beside ours. The README's table.

    pip install torchao optimum-quanto sdnq
    python -m ditq_bench.peers --out runs/peers

Each quantizes the linears that ditq packs, SDNQ also those of the timestep embedder, and samples from equal noise.
Bytes are those of all tensors of the transformer, with the embedder that diffusers keeps in every block counted once.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq_bench.methods import GUIDANCE, SAMPLES, SEED, STEPS, prepare
from ditq_bench.results import commit
from ditq_converters import Recipe, convert
from ditq_converters.evaluate import compare_runs, forced_sqnr, run
from ditq_converters.evaluate.paired import pooled_psnr_db
from ditq_converters.showcase.score import Baseline
from ditq_runtime.calls.pipeline import with_transformers
from ditq_runtime.files import atomic_file
from ditq_runtime.version import __version__

MODEL = "demo:digits"
FIELDS = (
    "model", "backend", "version", "what", "bytes", "sqnr_free_db", "sqnr_forced_db", "psnr_db", "steps", "guidance",
    "samples", "ditq", "commit",
)  # fmt: skip
EMBEDDER = ".norm1.emb."  # of every block; the first one counts
Quantize = Callable[[nn.Module, set[str]], None]


def _torchao(config: str, group: int = 0) -> Quantize:
    def quantize(model: nn.Module, names: set[str]) -> None:
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        chosen: dict[str, Any] = {}
        if group:
            int4: Any = vars(torch)["int4"]  # older type stubs do not know it
            chosen = {"weight_dtype": int4, "weight_granularity": PerGroup(group)}
        made = getattr(quantization, config)(**chosen)
        quantization.quantize_(model, made, filter_fn=lambda module, name: name in names)

    return quantize


def _quanto(weights: str) -> Quantize:
    def quantize(model: nn.Module, names: set[str]) -> None:
        from optimum import quanto

        kept = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in names]
        quanto.quantize(model, weights=getattr(quanto, weights), exclude=kept)
        quanto.freeze(model)

    return quantize


def _sdnq(weights: str, **given: Any) -> Quantize:
    def quantize(model: nn.Module, names: set[str]) -> None:
        from sdnq import sdnq_post_load_quant

        kept = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in names]
        sdnq_post_load_quant(
            model, weights_dtype=weights, add_skip_keys=False, minimum_allowed_numel=0,
            modules_to_not_convert=kept, **given,
        )  # fmt: skip

    return quantize


# distribution, what is quantized to what -> how
PEERS: tuple[tuple[str, str, Quantize], ...] = (
    ("torchao", "int8, activations int8", _torchao("Int8DynamicActivationInt8WeightConfig")),
    ("torchao", "int4 in groups of 64, activations int8",
     _torchao("Int8DynamicActivationIntxWeightConfig", group=64)),
    ("optimum-quanto", "int8, activations float", _quanto("qint8")),
    ("optimum-quanto", "int4, activations float", _quanto("qint4")),
    ("sdnq", "int8, activations float", _sdnq("int8")),
    ("sdnq", "uint4, activations float", _sdnq("uint4")),
    ("sdnq", "uint4 with SVD of rank 32, activations float", _sdnq("uint4", use_svd=True)),
)  # fmt: skip
OURS = {
    "w8, data-free": Recipe("linear", "w8"),
    "w8, smoothquant": Recipe("smoothquant", "w8"),
    "w4p, smoothquant": Recipe("smoothquant", "w4p"),
    "w4p, smoothquant, gptq": Recipe("smoothquant", "w4p", rounding="gptq", bias_correction=True),
}


def study(out: Path) -> Iterator[dict[str, Any]]:
    """A row for the float model, each of ours and each peer that is installed; one that fails says why in its row."""
    subject = prepare(MODEL, out / "stats")
    baseline, stats = subject.baseline, subject.stats
    float_model = baseline.pipe.transformer
    yield _row("diffusers", version("diffusers"), "fp32", size_of(float_model), {})
    names: set[str] = set()
    for what, recipe in OURS.items():
        packed: Any = convert(baseline.pipe, recipe, stats, quiet=True)
        names = set(packed.config.quantization_config.scheme.layers)
        yield _row("ditq", __version__, what, size_of(packed), judged(packed, baseline))
    for package, what, quantize in PEERS:
        found = _installed(package)
        if not found:
            continue
        model = copy.deepcopy(float_model)
        quantize(model, names)
        yield _row(package, found, what, size_of(model), judged(model, baseline))


def judged(model: nn.Module, baseline: Baseline) -> dict[str, str]:
    """What a quantized transformer draws, against the float model."""
    twin = {"transformer": model}
    own = run(with_transformers(baseline.pipe, twin), baseline.inputs, decode=True)
    assert own.images is not None
    return {
        "sqnr_free_db": f"{compare_runs(baseline.run, own).mean:.2f}",
        "sqnr_forced_db": f"{forced_sqnr(baseline.run.calls, twin).mean:.2f}",
        "psnr_db": f"{pooled_psnr_db(baseline.images, own.images):.2f}",
    }


def size_of(model: nn.Module) -> int:
    """Bytes of a transformer's tensors, those inside of tensor subclasses too, each once and its embedder once."""
    seen: dict[tuple[int, int], int] = {}
    embedder = None
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        place, inside, _ = name.partition(EMBEDDER)
        if inside and embedder not in (None, place):
            continue
        embedder = place if inside else embedder
        for part in _plain(tensor):
            seen[part.data_ptr(), part.numel()] = part.numel() * part.element_size()
    return sum(seen.values())


def _plain(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors that a tensor is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _row(
    backend: str, release: str, what: str, size: int, figures: dict[str, str]
) -> dict[str, Any]:
    row = dict.fromkeys(FIELDS, "")
    made = {
        "model": MODEL,
        "backend": backend,
        "version": release,
        "what": what,
        "bytes": size,
        **figures,
    }
    how = {
        "steps": STEPS,
        "guidance": GUIDANCE,
        "samples": SAMPLES,
        "ditq": __version__,
        "commit": commit(),
    }
    assert SEED == 0  # of the calibration; that of the noise is 1
    return {**row, **made, **how}


def main() -> None:
    """Measure and write."""
    from ditq_runtime.cli.output import print_table, say

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    out: Path = parser.parse_args().out
    rows = []
    for row in study(out):
        say(f"{row['backend']}, {row['what']}: {row['bytes']:,} B, {row['sqnr_free_db'] or '-'} dB")
        rows.append(row)
    with (
        atomic_file(out / "peers.csv") as part,
        part.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    columns = ("backend", "version", "what", "bytes", "sqnr_free_db", "sqnr_forced_db", "psnr_db")
    print_table(MODEL, columns, [[row[name] for name in columns] for row in rows])


if __name__ == "__main__":
    main()
