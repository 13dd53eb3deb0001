"""What happens to one site: whether a method transforms it, and where factor and shift go."""

from __future__ import annotations

from ditq_converters.methods import METHODS, Method
from ditq_converters.plan.entries import SitePlan
from ditq_converters.plan.recipe import Recipe
from ditq_runtime.families import (
    AdaLN,
    BlockTable,
    Family,
    NormWeights,
    OnTheFly,
    ProductRows,
    Site,
    ValueRows,
)
from ditq_runtime.families.placing import PLACES


def plan_site(block: str, site: Site, family: Family, recipe: Recipe) -> SitePlan:
    """The entry of one site under a recipe."""
    method = METHODS[recipe.method]
    readers = tuple(f"{block}.{name}" for name in site.consumers)
    place = place_under(site, method)
    name, reason = method.name, f"{method.name}: {where(site, place)}"
    if method.transform is None:
        reason = f"{method.name} transforms nothing"
    elif all(recipe.keeps(reader) for reader in readers):
        name, reason = "linear", "no transform: all that read it stay float"
    elif isinstance(site.producer, OnTheFly) and not _reaches(method, site.producer):
        name, reason = "linear", f"{method.name} leaves it alone: {where(site, place)}"
    return SitePlan(
        f"{block}.{site.name}",
        readers,
        place,
        name,
        recipe.method_options if name == recipe.method else {},
        shifts_at(site, place, family),
        recipe.range_method,
        "all" if method.static_call is None else "noisiest",
        reason,
    )


def _reaches(method: Method, producer: OnTheFly) -> bool:
    """Whether a method transforms what only the quantizer can; some papers do not behind an activation function."""
    return method.on_the_fly or producer.takes_shift


def place_under(site: Site, method: Method) -> str:
    """Where the transform of a method goes; shifts per timestep group go to the quantizer, and not into a norm."""
    place = place_of(site, rest=method.on_the_fly)
    takes = getattr(site.producer, "takes_shift", True)
    if method.over_time and (place == "norm" or (place == "value" and not takes)):
        return "quantizer"
    return place


def place_of(site: Site, rest: bool = True) -> str:
    """Where the transform of a site goes by itself; `rest`: channels beyond V are left to the quantizer."""
    if rest and isinstance(site.producer, ValueRows) and site.producer.rest is not None:
        return "value+quantizer"
    return PLACES[type(site.producer)]


def places_of(site: Site) -> tuple[str, ...]:
    """Where the transform of a site may go."""
    return tuple(dict.fromkeys((place_of(site), place_of(site, rest=False), "quantizer")))


def shifts_at(site: Site, place: str, family: Family) -> str:
    """What a site can be shifted by where its transform goes there."""
    grouped = "constant" if family.timestep_argument is None else "groups"
    match site.producer:
        case OnTheFly(takes_shift=False):
            return "none"
        case _ if place == "quantizer":
            return grouped if site.timed else "constant"
        case AdaLN():
            return grouped
        case ValueRows(_, _, takes_shift) | NormWeights(_, takes_shift):
            return "constant" if takes_shift else "none"
    return "none"


def where(site: Site, place: str) -> str:
    """In words."""
    match site.producer:
        case AdaLN(modulation) if place != "quantizer":
            return f"into the AdaLN rows of {modulation}"
        case ValueRows(values, rest) if place != "quantizer":
            through = f"through V, into the rows of {', '.join(values)}"
            if rest is None:
                return through
            left = "on the fly" if place == "value+quantizer" else "none"
            return f"{through}; the other channels {left}: {rest}"
        case NormWeights(norm) if place != "quantizer":
            return f"into the weights of {norm}"
        case ProductRows(linear) if place != "quantizer":
            return f"into the rows of {linear}"
        case OnTheFly(reason):
            return f"on the fly: {reason}"
    return "on the fly"


def kind_of(table: BlockTable, site: Site) -> str:
    """Fold kind of a site, as `ditq inspect` names it."""
    match site.producer:
        case AdaLN(modulation):
            return "K2" if modulation in table.tables else "K1"
        case ValueRows(_, rest):
            return "V" if rest is None else "V|G"
        case NormWeights():
            return "K5"
        case ProductRows():
            return "M"
        case OnTheFly(_, kind):
            return kind
