"""Whole text pipelines, tiny and random: text encoders, tokenizers, VAE and transformer, built without a network."""

import inspect
import json

import diffusers
import pytest
import torch
import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT, SIZE, LATENTS = 32, 8, 4  # width of the text encoders; side and channels of the latents
PROMPTS = ["a red fox", "two boats"]
TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}


def _t5():
    """(tokenizer of letters, encoder); the encoder's first ids are those T5 gives pad, end and unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS]
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0), transformers.T5EncoderModel(config)


def _clip(kind, width=TEXT):
    """(tokenizer of letters, encoder of class `kind`)."""
    letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {
        piece: i for i, piece in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])
    }
    begin, end = len(letters), len(letters) + 1
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=width, bos_token_id=begin, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    return tokenizer, kind(config)


def _vae(**changes):
    """Latents of half the side of the image."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=LATENTS, norm_num_groups=2,
        use_quant_conv=False, use_post_quant_conv=False, **changes,
    )  # fmt: skip


def _pixart(pipeline=diffusers.PixArtSigmaPipeline):
    tokenizer, encoder = _t5()
    transformer = diffusers.PixArtTransformer2DModel(
        **TRANSFORMER, in_channels=LATENTS, out_channels=2 * LATENTS, sample_size=SIZE, patch_size=2,
        caption_channels=TEXT, cross_attention_dim=64, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return pipeline(tokenizer, encoder, _vae(), transformer, scheduler)


def _sd3():
    """Each CLIP is half as wide as the T5, as both are concatenated and padded to its width."""
    clips = [_clip(transformers.CLIPTextModelWithProjection, TEXT // 2) for _ in range(2)]
    tokenizer, encoder = _t5()
    transformer = diffusers.SD3Transformer2DModel(
        **TRANSFORMER, sample_size=SIZE, patch_size=2, in_channels=LATENTS, out_channels=LATENTS,
        joint_attention_dim=TEXT, caption_projection_dim=64, pooled_projection_dim=TEXT, pos_embed_max_size=SIZE,
    )  # fmt: skip
    (tokenizer_1, encoder_1), (tokenizer_2, encoder_2) = clips
    return diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), _vae(shift_factor=0.1),
        encoder_1, tokenizer_1, encoder_2, tokenizer_2, encoder, tokenizer,
    )  # fmt: skip


def _flux():
    tokenizer, encoder = _clip(transformers.CLIPTextModel)
    tokenizer_2, encoder_2 = _t5()
    transformer = diffusers.FluxTransformer2DModel(
        **TRANSFORMER, num_single_layers=2, in_channels=4 * LATENTS, joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT, axes_dims_rope=(8, 12, 12), guidance_embeds=True,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = _vae(shift_factor=0.1)
    return diffusers.FluxPipeline(
        scheduler, vae, encoder, tokenizer, encoder_2, tokenizer_2, transformer
    )


BUILDERS = {
    "pixart-alpha": lambda: _pixart(diffusers.PixArtAlphaPipeline),
    "pixart-sigma": _pixart,
    "sd3": _sd3,
    "flux": _flux,
}


def _build(name):
    """A pipeline whose transformer is far from its initialization, where gates and outputs are zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = BUILDERS[name]()
        for module in pipe.transformer.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
                torch.nn.init.normal_(module.bias, std=0.2)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def build_pipe():
    """Builds a float pipeline by the name of its family."""
    return _build


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory):
    """Name of a family -> the folder of its float pipeline, written at the first request; do not change it."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("float") / name
            _build(name).save_pretrained(made[name])
        return made[name]

    return folder


def _call(pipe):
    """Arguments for two prompts, two steps and the smallest image, JSON-safe; guidance is the pipeline's own."""
    side = 2 * SIZE
    found = {"prompt": PROMPTS, "num_inference_steps": 2, "height": side, "width": side}
    if "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
        found["use_resolution_binning"] = False  # its bins begin at 256 pixels
    return {**found, "max_sequence_length": 16, "output_type": "np"}


@pytest.fixture(scope="session")
def call_of():
    """Pipeline -> the arguments that tests sample with."""
    return _call


@pytest.fixture(scope="session")
def transformer_inputs():
    """Pipeline -> the keyword arguments of every forward of its transformer while two prompts are drawn; the images."""

    def watch(pipe):
        calls = []

        def note(module, args, kwargs):
            if args:  # PixArt's pipeline passes its latents by position
                kwargs = {**kwargs, "hidden_states": args[0]}
            calls.append({key: value for key, value in kwargs.items() if key != "return_dict"})

        hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
        images = pipe(generator=torch.Generator().manual_seed(5), **_call(pipe)).images
        hook.remove()
        return calls, images

    return watch


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    """The prompts that models are calibrated with, one per line."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def inputs_file(tmp_path_factory):
    """The calls that models are calibrated with, one per line; sizes and steps are the smallest."""
    path = tmp_path_factory.mktemp("inputs") / "calls.jsonl"
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": 16}
    call |= {"height": 2 * SIZE, "width": 2 * SIZE}
    path.write_text("".join(json.dumps({"prompt": p, **call}) + "\n" for p in PROMPTS), "utf-8")
    return path


@pytest.fixture(scope="session")
def packed_folder(float_folder, inputs_file, ditq, tmp_path_factory):
    """(family, method, activations) -> a folder that `ditq calibrate` and `ditq convert` wrote; do not change it."""
    made, calibrated = {}, {}

    def calibrate(name):
        if name not in calibrated:
            calibrated[name] = tmp_path_factory.mktemp("calibrated") / name
            command = ["calibrate", float_folder(name), "--out", calibrated[name], "--rows", 0]
            if name.startswith("pixart"):  # its own begins at alpha = 0.006, and a random model's
                command += ["--sampler", "ddim"]  # second input would be 100 times as wide
            assert ditq(*command, "--inputs", inputs_file) == 0
        return calibrated[name]

    def folder(name, method="linear", activations="token"):
        key = name, method, activations
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "-".join(key)
            command = ["convert", float_folder(name), made[key], "--method", method]
            command += ["--activations", activations]
            if key[1:] != ("linear", "token"):
                command += ["--stats", calibrate(name), "--groups", 2]
            assert ditq(*command) == 0
        return made[key]

    return folder
