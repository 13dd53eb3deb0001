"""`--sampler`: another scheduler of diffusers for a pipeline, on the noise schedule that its model was trained with."""

from __future__ import annotations

from typing import Any

FLOW = "FlowMatchEulerDiscreteScheduler"
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow": FLOW,
}


def set_sampler(pipe: Any, name: str) -> None:
    """Give a pipeline the scheduler of that name, or leave its own for "".

    Args:
        pipe: a diffusers pipeline.
        name: one of SAMPLERS, or "".

    Raises:
        ValueError: an unknown name; a sampler for diffusion on a flow-matching model, or the other way around.
    """
    if not name:
        return
    if name not in SAMPLERS:
        raise ValueError(f"--sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    config = pipe.scheduler.config
    flows = (
        type(pipe.scheduler).__name__ == FLOW or config.get("prediction_type") == "flow_prediction"
    )
    if flows != (name == "flow"):
        kind = "flow matching" if flows else "diffusion"
        fitting = [known for known in SAMPLERS if (known == "flow") == flows]
        raise ValueError(
            f"--sampler {name}: this model was trained with {kind}; take {' or '.join(fitting)}, or leave it out"
        )
    import diffusers

    pipe.scheduler = getattr(diffusers, SAMPLERS[name]).from_config(config)
