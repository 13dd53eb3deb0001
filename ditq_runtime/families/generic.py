"""The row for every diffusers transformer without a table of its own: integer linears, no folds.

Nothing is known about what feeds a linear, so each is a site of its own and a smoothing factor stays with its
quantizer. Blocks keep diffusers' forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

from torch import nn

from ditq_runtime.families.family import BlockTable, Family
from ditq_runtime.families.sites import OnTheFly, Site

HOME = "diffusers.models.transformers."
REASON = "this family has no table: what feeds the linear is unknown"
EMBEDDER = "embedder: one row per sample, or read once per prompt; kept float"
ROUTER = "router of a mixture of experts: its choices are not to be disturbed, kept float"
OUTSIDE = "outside the repeated blocks: embedder or final layer, kept float"


def is_transformer(architecture: str) -> bool:
    """Whether diffusers has a transformer model of that class name."""
    import diffusers

    found = getattr(diffusers, architecture, None) if architecture else None
    return inspect.isclass(found) and found.__module__.startswith(HOME)


def generic_family(architecture: str) -> Family:
    """The generic row, for one class name."""
    return Family(
        architecture,
        block_tables,
        kept={"emb": EMBEDDER, ".gate": ROUTER, ".router": ROUTER, "": OUTSIDE},
    )


def block_tables(model: nn.Module) -> dict[str, BlockTable]:
    """Every list of modules with two linears or more in each holds blocks, unless an embedder owns it.

    Raises:
        ValueError: the model has no such list.
    """
    tables = {
        name: _table(block)
        for attribute, blocks in block_lists(model, _is_embedder)
        for name, block in ((f"{attribute}.{i}", block) for i, block in blocks.named_children())
    }
    if not tables:
        raise ValueError(
            f"{type(model).__name__} has no list of repeated blocks with linears; ditq has nothing to quantize in it"
        )
    return tables


def block_lists(
    module: nn.Module, skip: Callable[[str], bool] = lambda name: False, prefix: str = ""
) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of modules with two linears or more in each: full name, list.

    Containers are no blocks (ConsisID's face features): a block gets a module of ours, which would be called or
    unpacked with what is in them.

    Args:
        module: to search.
        skip: full name -> whether to leave a module out.
        prefix: of the names of its children.
    """
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if skip(full):
            continue
        if isinstance(child, nn.ModuleList):
            if len(child) and all(_is_block(block) for block in child):
                yield full, child
        else:
            yield from block_lists(child, skip, f"{full}.")


def _is_block(module: nn.Module) -> bool:
    container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    return not container and _num_linears(module) > 1


def _num_linears(block: nn.Module) -> int:
    return sum(isinstance(module, nn.Linear) for module in block.modules())


def _table(block: nn.Module) -> BlockTable:
    """Plain linears become sites, modulation linears weight-only; subclasses of nn.Linear may be read otherwise."""
    plain = [name for name, module in block.named_modules() if type(module) is nn.Linear]
    wanted = [name for name in plain if not _is_embedder(name) and not _is_router(name)]
    modulations = {name: 1 for name in wanted if _is_modulation(name)}
    sites = tuple(
        Site(name.replace(".", "_"), (name,), OnTheFly(REASON, "-"))
        for name in wanted
        if name not in modulations
    )
    return BlockTable(sites, modulations)


def _is_embedder(name: str) -> bool:
    return any("emb" in part or "guidance" in part for part in name.lower().split("."))


def _is_router(name: str) -> bool:
    return any(part in ("gate", "router") for part in name.lower().split("."))


def _is_modulation(name: str) -> bool:
    """AdaLN and its like: one row per sample, and nearly a third of many models."""
    return any(
        "norm" in part or "adaln" in part or "modulation" in part or part.endswith("_mod")
        for part in name.lower().split(".")
    )
