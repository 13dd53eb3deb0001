"""Runs the code blocks of README.md and docs/: Python as it stands, `ditq` lines in this process, on tiny stand-ins.

A page runs in an empty folder. Names of models and files that it mentions stand there as tiny ones (STAND_INS), so a
hub id is a folder of that name. Long work is made short (shorter): two steps, the smallest images, "cpu" for "cuda".
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import torch

import ditq_converters
from ditq_bench.zoo import PIPELINES, quiet
from ditq_bench.zoo.pipe import picture
from ditq_converters.methods import METHODS

ROOT = Path(__file__).parents[2]
EXCUSE = re.compile(r"<!-- does not run: (.+?) -->")
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^ {4}((?:ditq|python -m ditq_bench\.\S+) .+)$", re.M)
READ_ONLY = ("json", "text", "html", "toml")  # languages of blocks that show something
NOT_OURS = (
    "pip ",
    "make ",
    "hf ",
    "git ",
    "cd ",
    "python -m ",
    "DITQ_HOST_TABLE",
    "torchrun ",
    "#",
)
SHORT = {  # command -> options that make it short, where the line has none of that name
    "calibrate": {"--steps": "2", "--rows": "8"},
    "convert": {"--steps": "2"},
    "eval": {"--steps": "2", "--samples": "2", "--few-samples": "2"},
    "sample": {"--steps": "2"},
    "bench kernels": {"--budget": "0.05"},
}
SIDE = 16  # pixels of what tiny pipelines draw


@dataclass(frozen=True)
class Block:
    """A block of a page: its language, text, line, and why it does not run ("" where it does)."""

    language: str
    text: str
    line: int
    excuse: str


def _pipeline(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with quiet():
            PIPELINES[name].build().save_pretrained(folder)

    return make


def _prompts(path: Path) -> None:
    path.write_text("a red fox in the snow\ntwo boats at night\n", encoding="utf-8")


def _picture(path: Path) -> None:
    picture().save(path)


def _lora(folder: Path) -> None:
    """A LoRA of the tiny Flux, as diffusers saves one."""
    pipe = PIPELINES["Flux"].build()
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"]))
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(folder, transformer_lora_layers=layers)


def _facebook_dit(path: Path) -> None:
    """DiT-S/2 of depth 1 under the names of DiT's own code: small random numbers."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    wide, patch, side = 384, 2, 4
    shapes = {
        "x_embedder.proj": (wide, 4, patch, patch), "t_embedder.mlp.0": (wide, 256), "t_embedder.mlp.2": (wide, wide),
        "final_layer.linear": (patch**2 * 8, wide), "final_layer.adaLN_modulation.1": (2 * wide, wide),
        "blocks.0.attn.qkv": (3 * wide, wide), "blocks.0.attn.proj": (wide, wide),
        "blocks.0.mlp.fc1": (4 * wide, wide), "blocks.0.mlp.fc2": (wide, 4 * wide),
        "blocks.0.adaLN_modulation.1": (6 * wide, wide),
    }  # fmt: skip
    state = {f"{name}.weight": torch.randn(shape) / 20 for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.randn(shape[0]) / 20 for name, shape in shapes.items()}
    state["y_embedder.embedding_table.weight"] = torch.randn(1001, wide)
    fixed = get_2d_sincos_pos_embed(wide, side, base_size=side, output_type="pt")
    torch.save({**state, "pos_embed": fixed.float().reshape(1, side**2, wide)}, path)


STAND_INS: dict[str, Callable[[Path], None]] = {
    "facebook/DiT-XL-2-256": _pipeline("DiT"),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": _pipeline("PixArtSigma"),
    "stabilityai/stable-diffusion-3.5-medium": _pipeline("SD3"),
    "black-forest-labs/FLUX.1-dev": _pipeline("Flux"),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _pipeline("Wan"),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _pipeline("Wan22"),
    "my-model": _pipeline("Flux"),
    "MODEL": _pipeline("Flux"),
    "my-lora": _lora,
    "my-dit.pt": _facebook_dit,
    "prompts.txt": _prompts,
    "fox.jpg": _picture,
}


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, and indented lines that begin with a command of ours, in order."""
    found = []
    for match in FENCE.finditer(text):
        found.append(_block(text, match.start(), match[1], match[2]))
    bare = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    lines = text.split("\n")
    for number, line in enumerate(bare.split("\n")):
        if COMMAND.match(line) and lines[number] == line:
            start = sum(len(before) + 1 for before in lines[:number])
            found.append(_block(text, start, "sh", line.strip() + "\n"))
    return sorted(found, key=lambda block: block.line)


def _block(text: str, start: int, language: str, content: str) -> Block:
    before = text[:start].rstrip().rpartition("\n")[2]
    excuse = EXCUSE.fullmatch(before)
    return Block(language, content, text.count("\n", 0, start) + 1, excuse[1] if excuse else "")


def commands(text: str) -> list[str]:
    """The lines of a shell block, continued ones joined, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="session")
def all_blocks() -> list[tuple[str, Block]]:
    """(page, block) of every page."""
    return [(p.relative_to(ROOT).as_posix(), b) for p in pages() for b in blocks(p.read_text())]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """(text, folder): puts there what the text mentions."""
    home = tmp_path_factory.mktemp("stand-ins")

    def place(text: str, folder: Path) -> None:
        for name, make in STAND_INS.items():
            if name not in text:
                continue
            made = home / name
            if not made.exists():
                made.parent.mkdir(parents=True, exist_ok=True)
                make(made)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(made)

    return place


@pytest.fixture
def shorter(monkeypatch):
    """Pipelines take two steps and draw the smallest images, whatever they are told; torch compiles nothing."""
    import diffusers

    def short(call: Callable) -> Callable:
        names = inspect.signature(call).parameters

        @functools.wraps(call)
        def shortened(self, *args, **given):
            given["num_inference_steps"] = min(given.get("num_inference_steps") or 2, 2)
            for side in {"height", "width"} & set(names):
                given[side] = min(given.get(side) or SIDE, 2 * SIDE)
            if "num_frames" in names:
                given["num_frames"] = 5
            if "use_resolution_binning" in names:
                given["use_resolution_binning"] = False  # its bins begin at 256 pixels
            return call(self, *args, **given)

        return shortened

    calibrate, evaluate = ditq_converters.calibrate, ditq_converters.evaluate

    def calibrate_shortly(*args, **given):
        return calibrate(*args, **{**given, "steps": 2, "rows": 8})

    def evaluate_shortly(packed, pipe, settings, *args, **given):
        settings = replace(settings, steps=2, samples=2, few_samples=2)
        return evaluate(packed, pipe, settings, *args, **given)

    monkeypatch.setattr(METHODS, "data", dict(METHODS.data))  # pages add methods
    monkeypatch.setattr(ditq_converters, "calibrate", calibrate_shortly)
    monkeypatch.setattr(ditq_converters, "evaluate", evaluate_shortly)
    for name in ("DiT", "PixArtAlpha", "PixArtSigma", "StableDiffusion3", "Flux", "Wan"):
        kind = getattr(diffusers, f"{name}Pipeline")
        monkeypatch.setattr(kind, "__call__", short(kind.__call__))
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def run_page(tmp_path, monkeypatch, ditq, stand_in, shorter):
    """Runs all blocks of a page in an empty folder."""

    def run(page: Path) -> None:
        text = page.read_text()
        monkeypatch.chdir(tmp_path)
        stand_in(text, tmp_path)
        names: dict = {"__name__": "__main__"}  # as if pasted
        for block in blocks(text):
            if block.excuse or block.language in READ_ONLY:
                continue
            place = f"{page.relative_to(ROOT)}:{block.line}"
            if block.language == "python":
                code = compile(block.text.replace('"cuda"', '"cpu"'), place, "exec")
                exec(code, names)  # what a reader would paste
                continue
            assert block.language == "sh", f"{place}: a block of {block.language!r}"
            for line in commands(block.text):
                _run_line(line, place, ditq)

    return run


def _run_line(line: str, place: str, ditq: Callable[..., int]) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "ditq":
        arguments = _shortened([word.replace("cuda", "cpu") for word in words[1:]])
        assert ditq(*arguments) == 0, f"{place}: {line}"
    elif not line.startswith(NOT_OURS):
        subprocess.run(["sh", "-ec", line], check=True, env={"PATH": os.environ["PATH"]})


def _shortened(arguments: list[str]) -> list[str]:
    command = next((c for c in SHORT if arguments[: c.count(" ") + 1] == c.split()), "")
    for option, value in SHORT.get(command, {}).items():
        if option in arguments:
            at = arguments.index(option) + 1
            arguments[at] = str(min(float(arguments[at]), float(value))).removesuffix(".0")
        else:
            arguments += [option, value]
    return arguments
