"""Rounding aimed at the float model's outputs: every linear makes up for what was quantized before it.

Linears are converted in the order in which they run. Each is given the inputs that the packed model will show to it,
and rounded towards the outputs that the float model has at the same tokens (`target.aimed`), instead of towards its own
outputs on the float model's inputs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from ditq_converters.convert.bias_correction import SampledRows
from ditq_converters.convert.emulated import Emulated, Rounded, playable
from ditq_converters.convert.fold import Block, LinearTensors, output_units
from ditq_converters.convert.gptq import Feedback, error_feedback
from ditq_converters.convert.observed import Observed
from ditq_converters.convert.prefix import Prefix
from ditq_converters.convert.target import aimed, best_damping
from ditq_converters.methods import BlockTransform, Transform
from ditq_runtime.families import BlockTable
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers.site import Site


class Goal:
    """What a site's readers see and what they should have seen, as their folded weights do.

    Attributes:
        wanted: [R, K] fp64, inputs of the float model.
        seen: [R, K] fp64, inputs behind all that is quantized before.
    """

    def __init__(
        self, wanted: torch.Tensor, seen: torch.Tensor, codes: torch.Tensor, half: torch.Tensor
    ) -> None:
        """Keep both.

        Args:
            wanted: see above.
            seen: see above.
            codes: [R, K] fp64, what the quantizer makes of `seen`.
            half: [R] bool, see `prefix.Rows`.
        """
        self.wanted, self.seen = wanted, seen
        self._codes, self._half = codes, half
        self._feedback: dict[bool, Feedback] = {}

    def feedback(self, centred: bool) -> Feedback:
        """How errors of columns spread; one for all readers that a bias serves, or none does."""
        if centred not in self._feedback:
            self._feedback[centred] = error_feedback(self._codes, centred=centred)
        return self._feedback[centred]

    def target(self, weight: torch.Tensor, centred: bool) -> torch.Tensor:
        """[N, K] fp64: what the codes of a folded weight should stand for."""
        wanted, codes = self.wanted, self._codes
        if centred:
            wanted, codes = wanted - wanted.mean(0), codes - codes.mean(0)
        return aimed(weight, wanted, codes, best_damping(weight, wanted, codes, self._half))


class Aim:
    """One block on its way through `convert_block`.

    Attributes:
        prefix: the two models, run up to the block once a linear is observed.
        block: its name.
        targets: name inside the block -> [N, K] fp32, what its codes should stand for, once it is observed.
        site: name inside the block -> the site that it reads.
    """

    def __init__(
        self,
        prefix: Prefix,
        block: str,
        table: BlockTable,
        linears: Block,
        choice: BlockTransform,
        in_quantizer: Collection[str],
    ) -> None:
        """Run both models up to the block.

        Raises:
            ValueError: the transforms follow the timestep.
        """
        if choice.num_groups > 1:
            raise ValueError(
                f"convert: {block}: rounding aimed needs one bias for all timesteps, and its method has "
                f"{choice.num_groups} timestep groups; take rounding gptq, or another method"
            )
        self.prefix, self.block = prefix, block
        self.targets: dict[str, torch.Tensor] = {}
        folded = {n: t for n, t in choice.sites.items() if n not in in_quantizer}
        self._units = output_units(linears, table, folded)
        self.site = {name: site.name for site in table.sites for name in site.consumers}
        self._transforms = {
            name: choice.sites.get(site, Transform()) for name, site in self.site.items()
        }
        self._goals: dict[str, Goal] = {}

    def observed(
        self, name: str, linear: LinearTensors, activations: str, quantizer: dict[str, torch.Tensor]
    ) -> Observed:
        """What rounding and bias correction read.

        Args:
            name: inside the block.
            linear: folded, fp64.
            activations: of its site.
            quantizer: tensors of its site.
        """
        goal = self._goal(name, activations, quantizer)
        centred = linear.bias is not None  # a bias takes back the mean error
        group = torch.zeros(len(goal.seen), dtype=torch.int64)
        target = goal.target(linear.weight, centred)
        self.targets[name] = target.float()
        return Observed(
            feedback=goal.feedback(centred),
            rows=(lambda: SampledRows(goal.wanted, group, goal.seen)) if centred else None,
            target=target,
        )

    def finish(self, name: str, rounded: Rounded) -> None:
        """Let the linears that follow see what this one became."""
        linear: Any = self.prefix.wanted.get_submodule(f"{self.block}.{name}")
        layer = playable(
            linear.in_features,
            linear.out_features,
            rounded.layer_format,
            rounded.stored,
            rounded.quantizer,
        )
        transform = self._transforms.get(name, Transform())
        self.prefix.finish(
            f"{self.block}.{name}", Emulated(layer, transform, self._units.get(name))
        )

    def _goal(self, name: str, activations: str, quantizer: dict[str, torch.Tensor]) -> Goal:
        site = self.site[name]
        if site not in self._goals:
            transform = self._transforms[name]
            if not self._goals:  # all that runs before the block is finished by now
                self.prefix.enter(self.block)
            rows = self.prefix.rows(name)
            wanted, seen = (transform.apply(part, ()) for part in (rows.wanted, rows.seen))
            codes = _coded(seen, activations, quantizer)
            self._goals[site] = Goal(wanted, seen, codes, rows.half)
        return self._goals[site]


def _coded(
    rows: torch.Tensor, activations: str, quantizer: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Transformed rows [R, K] as the quantizer leaves them, fp64."""
    site = Site(rows.shape[1], SiteFormat(("linear",), activations))
    kept = {name: tensor for name, tensor in quantizer.items() if name in ("act_scale", "act_zero")}
    site.load_state_dict(kept, assign=True)
    codes = site(rows.float())
    q = codes.q.double()
    if codes.zero_point is not None:
        q = q - codes.zero_point.double()[:, None]
    return q * codes.scale.double()[:, None]
