"""What a pipeline folder says about its own calls: `ditq/call.json`, the arguments of a call where nobody gives others.

    {"prompt": ["zero", "one"], "height": 32, "width": 32, "num_inference_steps": 20}

`prompt` lists texts to draw where no inputs are given; everything else belongs to every call. diffusers keeps no such
thing: what a Flux was trained at stands nowhere in its folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditq_runtime.format.folder import read_json

CALL = Path("ditq") / "call.json"
ATTRIBUTE = "ditq_call"  # of a pipeline that was made in memory


def saved_call(pipe: Any) -> dict[str, Any]:
    """The arguments; none where the pipeline says nothing.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    own = getattr(pipe, ATTRIBUTE, None)
    if own is not None:
        return dict(own)
    folder = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    file = Path(str(folder)) / CALL
    return read_json(file) if folder and file.exists() else {}
