"""A model whose weights stay on disk: the same bytes as in memory, killed or not, and refusals before the work."""

import json
import random
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditq_converters import Recipe, calibrate, convert, open_model
from ditq_converters.calibrate.share import LOG
from ditq_converters.memory import held
from ditq_converters.pipeline_folder import write_pipeline
from ditq_converters.streaming.finished import folder_of
from ditq_converters.streaming.model import streamed_of
from ditq_converters.streaming.opening import open_in_pieces
from ditq_converters.streaming.source import WEIGHTS
from ditq_runtime.calls.parts import transformer_of
from ditq_runtime.errors import CheckpointError

BUDGET = 2**40
STORY, JOBS = (  # what `convert` looks its steps up in
    vars(sys.modules[f"ditq_converters.convert.{name}"]) for name in ("story", "jobs")
)
LINEAR = Recipe(method="linear")
RECIPES = {
    "linear": LINEAR,
    "w4p": Recipe(weights="w4p", activations="static"),
    "htg": Recipe(method="htg", weights="w4p", activations="static", num_groups=2),
    "corrected": Recipe(
        "htg", "w4p", "static", num_groups=2, groups_per_layer=True, lora_rank=4, rounding="gptq",
        bias_correction=True, weight_range_method="ptq4dit_pct",
    ),
    "learned": Recipe(
        "osplus", "w4p", "token_asym", rounding="reconstruct", iterations=3, bias_correction=True,
        modulation_activations="static",
    ),
    "ditas": Recipe(method="ditas", lora_rank=4, keep=("*.to_k", "*.1.norm1.linear")),
}  # fmt: skip

SMALL = {"steps": 4, "samples": 3, "guidance": 2.0, "rows": 8, "quiet": True}


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOG
    }


@pytest.fixture(scope="module")
def source(make_pipeline, tmp_path_factory):
    """A pipeline folder in several shards, its embedders equal in both blocks."""
    pipe = make_pipeline()
    first, second = (block.norm1.emb for block in pipe.transformer.transformer_blocks)
    second.load_state_dict(first.state_dict())
    folder = tmp_path_factory.mktemp("source") / "model"
    write_pipeline(pipe, folder, "300KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def stats(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats")
    return calibrate(open_model(str(source)), folder, **SMALL)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shards", ["10GB", "200KB"])
def test_a_streamed_conversion_has_the_bytes_of_one_in_memory(
    source, stats, tmp_path, name, shards
):
    for out, pipe in (
        ("memory", open_model(str(source))),
        ("pieces", open_in_pieces(source, BUDGET)),
    ):
        convert(pipe, RECIPES[name], stats, tmp_path / out, shards, quiet=True)
    whole = files(tmp_path / "memory")
    assert len([path for path in whole if path.startswith("transformer/")]) > (
        3 if shards == "200KB" else 1
    )
    assert files(tmp_path / "pieces") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "pieces"]


def test_the_weights_are_never_in_the_model(source, stats, tmp_path):
    pipe = open_in_pieces(source, BUDGET)
    packed = convert(pipe, RECIPES["w4p"], stats, tmp_path / "out", quiet=True)
    assert all(tensor.is_meta for tensor in packed.parameters())
    blocks = pipe.transformer.transformer_blocks
    assert all(tensor.is_meta for tensor in blocks.parameters())
    assert not any(p.is_meta for p in pipe.transformer.pos_embed.parameters())
    assert pipe.vae is None


def test_a_transformer_alone(source, tmp_path):
    folder = source / "transformer"
    for out, model in (
        ("memory", open_model(str(folder))),
        ("pieces", open_in_pieces(folder, BUDGET)),
    ):
        convert(model, LINEAR, out=tmp_path / out, quiet=True)
    assert files(tmp_path / "pieces") == files(tmp_path / "memory")
    assert sorted(files(tmp_path / "pieces")) == ["config.json", WEIGHTS, "ditq/plan.json"]


def test_half_precision_weights_are_read_as_fp32(make_dit, tmp_path):
    make_dit().to(torch.float16).save_pretrained(tmp_path / "half")
    for out, model in (
        ("memory", open_model(str(tmp_path / "half"))),
        ("pieces", open_in_pieces(tmp_path / "half", BUDGET)),
    ):
        convert(model, LINEAR, out=tmp_path / out, quiet=True)
    assert files(tmp_path / "pieces") == files(tmp_path / "memory")
    assert load_file(tmp_path / "pieces" / WEIGHTS)["proj_out_2.weight"].dtype == torch.float32


def test_a_streamed_calibration_has_the_bytes_of_one_in_memory(source, stats, tmp_path):
    pipe = open_in_pieces(source, BUDGET)
    calibrate(pipe, tmp_path, **SMALL)
    assert files(tmp_path) == files(stats.folder)
    assert all(tensor.is_meta for tensor in pipe.transformer.transformer_blocks.parameters())


def test_a_block_is_not_read_before_its_turn(source):
    """In a forward at most one module of the blocks has its weights."""
    model = transformer_of(open_in_pieces(source, BUDGET))
    loaded = []

    def look(*_):
        blocks = model.transformer_blocks
        loaded.append(
            sum(
                any(not p.is_meta for p in m._parameters.values() if p is not None)
                for m in blocks.modules()
            )
        )

    for module in model.transformer_blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(look)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        model(latents, timestep=torch.tensor([500]), class_labels=torch.tensor([0]))
    assert len(loaded) >= 2 * 9
    assert set(loaded) == {1}


JOB = "convert(pipe, Recipe(weights='w4p'), stats, {out!r}, '200KB', quiet=True)"


@pytest.fixture(scope="module")
def killed(killable, source, stats, tmp_path_factory):
    """The files of an uninterrupted streamed conversion, and how many write events it has."""
    killable.prepare(
        "from ditq_converters.streaming.opening import open_in_pieces; "
        f"pipe = open_in_pieces(Path({str(source)!r}), {BUDGET}); "
        f"stats = CalibrationStats.open({str(stats.folder)!r})"
    )
    out = tmp_path_factory.mktemp("whole") / "out"
    events = killable.run(JOB.format(out=str(out)), slow=True)
    assert events > 20
    return files(out), events


def test_a_killed_conversion_goes_on_to_the_same_bytes(killable, killed, tmp_path):
    whole, events = killed
    rng, with_blocks = random.Random(0), 0
    for attempt, event in enumerate(sorted(rng.sample(range(1, events - 2), 6))):
        out = tmp_path / str(attempt) / "out"
        job = JOB.format(out=str(out))
        assert killable.kill_at(job, event, rng.uniform(0, 0.01))
        kept = folder_of(out)
        with_blocks += bool(list(kept.rglob("*.safetensors")))
        if out.exists():  # killed between the rename and the end
            assert files(out) == whole
            continue
        killable.run(job)
        assert files(out) == whole
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert with_blocks >= 2


def test_finished_blocks_are_not_converted_again(source, tmp_path, monkeypatch):
    out, pipe = tmp_path / "out", open_in_pieces(source, BUDGET)
    made = []
    real = JOBS["convert_block"]

    def counted(model, family, block, *rest):
        if made == ["transformer_blocks.0"] and block == "transformer_blocks.1":
            made.append("stop")
            raise KeyboardInterrupt
        made.append(block)
        return real(model, family, block, *rest)

    monkeypatch.setitem(JOBS, "convert_block", counted)
    with pytest.raises(KeyboardInterrupt):
        convert(pipe, LINEAR, out=out, quiet=True)
    assert not out.exists()
    assert sorted(path.name for path in (folder_of(out) / "transformer").iterdir()) == [
        "conversion.json",
        "convert.log",
        "transformer_blocks.0.safetensors",
    ]
    convert(pipe, LINEAR, out=out, quiet=True)
    assert made == ["transformer_blocks.0", "stop", "transformer_blocks.1"]
    convert(open_model(str(source)), LINEAR, out=tmp_path / "memory", quiet=True)
    assert files(out) == files(tmp_path / "memory")


@pytest.mark.parametrize("change", ["recipe", "weights", "damaged settings"])
def test_blocks_of_another_conversion_are_not_used(source, make_dit, tmp_path, monkeypatch, change):
    out, folder = tmp_path / "out", source / "transformer"
    model = open_in_pieces(folder, BUDGET)
    with monkeypatch.context() as patch:
        patch.setitem(STORY, "write_streamed", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(model, LINEAR, out=out, quiet=True)
    assert len(list(folder_of(out).rglob("*.safetensors"))) == 3  # two blocks, final modulation
    recipe = Recipe(method="linear", weights="w4p") if change == "recipe" else LINEAR
    if change == "weights":
        make_dit(seed=4).save_pretrained(tmp_path / "other")
        folder = tmp_path / "other"
    if change == "damaged settings":
        settings = folder_of(out) / "transformer" / "conversion.json"
        settings.write_text(settings.read_text()[:40])
    convert(open_in_pieces(folder, BUDGET), recipe, out=out, quiet=True)
    convert(open_model(str(folder)), recipe, out=tmp_path / "memory", quiet=True)
    assert files(out) == files(tmp_path / "memory")


def damage(folder, how):
    """Rewrite the transformer as one file with one defect."""
    transformer, tensors = folder / "transformer", {}
    for path in transformer.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (transformer / f"{WEIGHTS}.index.json").unlink()
    name = "transformer_blocks.1.attn1.to_q.weight"
    if how == "missing":
        del tensors[name]
    if how == "renamed":
        tensors[name.replace("to_q", "query")] = tensors.pop(name)
    if how == "misshapen":
        tensors[name] = tensors[name][:, :8].contiguous()
    if how == "not finite":
        tensors[name][0, 0] = torch.nan
    save_file(tensors, transformer / WEIGHTS)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing", r"to_q\.weight is missing from its weights"),
        (
            "renamed",
            r"to_q\.weight is missing, but transformer_blocks\.1\.attn1\.query\.weight is there",
        ),
        ("misshapen", r"to_q\.weight has shape \[64, 8\], config\.json asks for \[64, 64\]"),
        (
            "not finite",
            r"transformer_blocks\.1\.attn1\.to_q\.weight: holds a value that is not finite",
        ),
    ],
)
def test_a_defect_of_the_source_has_its_sentence(make_pipeline, tmp_path, how, sentence):
    write_pipeline(make_pipeline(), tmp_path / "model", "300KB")
    damage(tmp_path / "model", how)
    with pytest.raises(ValueError, match=sentence):
        convert(
            open_in_pieces(tmp_path / "model", BUDGET), LINEAR, out=tmp_path / "out", quiet=True
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_cut_off_or_absent_shard_is_refused(make_pipeline, tmp_path):
    write_pipeline(make_pipeline(), tmp_path / "model", "300KB")
    shard = sorted((tmp_path / "model" / "transformer").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=f"{shard.name}: .*copy it again"):
        open_in_pieces(tmp_path / "model", BUDGET)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: missing, though .*index.json names it"):
        open_in_pieces(tmp_path / "model", BUDGET)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_a_pickle_is_refused_by_name_and_never_opened(
    make_pipeline, tmp_path, monkeypatch, component
):
    write_pipeline(make_pipeline(), tmp_path / "model")
    weights = tmp_path / "model" / component / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(ValueError, match=rf"{component}/diffusion_pytorch_model\.bin: is a pickle"):
        open_in_pieces(tmp_path / "model", BUDGET)


def test_a_pickle_beside_safetensors_is_left_out(make_pipeline, tmp_path):
    write_pipeline(make_pipeline(), tmp_path / "model")
    (tmp_path / "model" / "vae" / "old.bin").write_bytes(b"never read")
    convert(open_in_pieces(tmp_path / "model", BUDGET), LINEAR, out=tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert (tmp_path / "out" / "vae" / WEIGHTS).exists()


def test_a_budget_decides_where_the_weights_are(source):
    roomy = open_model(str(source), memory_budget=held(torch.device("cpu")) + 2**30)
    assert streamed_of(roomy.transformer) is None
    tight = open_model(str(source), memory_budget=held(torch.device("cpu")) // 2)
    assert streamed_of(tight.transformer) is not None


def test_a_budget_below_one_block_says_what_would_do(source, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"budget of 1\.0 MiB is too small: one block at a time needs .*allow at least",
    ):
        convert(str(source), LINEAR, out=tmp_path / "out", quiet=True, memory_budget=2**20)
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_model_has_no_budget_and_a_streamed_one_needs_a_folder(source, make_dit):
    with pytest.raises(ValueError, match="this one is loaded; pass its folder"):
        convert(make_dit(), LINEAR, memory_budget=2**30, quiet=True)
    with pytest.raises(ValueError, match="needs a folder `out`"):
        convert(open_in_pieces(source, BUDGET), LINEAR, quiet=True)


def test_a_hub_model_is_downloaded_and_opened_from_its_folder(source, monkeypatch):
    asked = []

    def download(name):
        asked.append(name)
        return str(source)

    monkeypatch.setattr("ditq_runtime.host.hub_cache.is_pipeline", lambda name: True)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    pipe = open_model("someone/a-dit", memory_budget=2**20)
    assert asked == ["someone/a-dit"]
    assert streamed_of(pipe.transformer) is not None


def test_an_old_class_name_and_paths_are_not_carried_on(source, tmp_path):
    """Hub folders of DiT say Transformer2DModel, and resaved ones where they were loaded from."""
    folder = tmp_path / "model"
    write_pipeline(open_model(str(source)), folder)
    for path, key, value in (
        (folder / "transformer" / "config.json", "_class_name", "Transformer2DModel"),
        (folder / "vae" / "config.json", "_name_or_path", "/home/me/secret"),
        (folder / "model_index.json", "transformer", ["diffusers", "Transformer2DModel"]),
    ):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, key: value}))
    convert(open_in_pieces(folder, BUDGET), LINEAR, out=tmp_path / "out", quiet=True)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert index["id2label"]["7"] == "cock"
    assert not any(
        b"secret" in data or b"_name_or_path" in data for data in files(tmp_path / "out").values()
    )
