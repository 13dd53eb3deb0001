"""The sites of a scheme as modules of a model, and the linears that read them."""

from __future__ import annotations

from torch import nn

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.format.site import SITES, SiteFormat
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.site import Site


def install_sites(model: nn.Module, scheme: Scheme) -> None:
    """Give every block the sites that the scheme lists, uninitialized, and let its linears read them.

    Args:
        model: with its packed linears in place.
        scheme: what the checkpoint is.

    Raises:
        CheckpointError: a block that the model does not have, readers of different sizes.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = {
        name for name, _ in model.named_parameters()
    }  # modulation tables are still among them
    for name, site_format in sorted(scheme.sites.items()):  # as a stored scheme lists them
        block, _, inside = name.rpartition(".")
        if block not in modules:
            raise CheckpointError(f"scheme: site {name} is in a block {block} that the model lacks")
        if not hasattr(modules[block], SITES):
            setattr(modules[block], SITES, nn.ModuleDict())
        for producer in site_format.producers.keys() - tensors - modules.keys():
            raise CheckpointError(
                f"scheme: site {name} was folded into {producer}, which the model lacks"
            )
        getattr(modules[block], SITES)[inside] = _site(name, site_format, modules)


def _site(name: str, site_format: SiteFormat, modules: dict[str, nn.Module]) -> Site:
    readers = [modules[reader] for reader in site_format.readers]
    widths = {reader.in_features for reader in readers if isinstance(reader, QuantLinear)}
    if len(widths) != 1:
        raise CheckpointError(f"scheme: site {name} is read by linears of {sorted(widths)} inputs")
    site = Site(widths.pop(), site_format)
    for reader in readers:
        if isinstance(reader, QuantLinear) and reader.format.integer_gemm:
            reader.read(site)
    if site_format.is_folded:
        for linear in (*readers, *(modules.get(producer) for producer in site_format.producers)):
            if isinstance(linear, QuantLinear):
                linear.folded = True
    return site
