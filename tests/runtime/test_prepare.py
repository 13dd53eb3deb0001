"""configure and prepare: switches that exist, modulation computed once per run, the same images."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PixArtSigmaPipeline

import ditq_kernels as k
import ditq_runtime as ditq
from ditq_converters import Recipe, calibrate, convert
from ditq_runtime.families import family_of
from ditq_runtime.layers.carrier import here
from ditq_runtime.speed import cuda_graph
from ditq_runtime.speed.cuda_graph import KEPT, TIMED, GraphedForward
from ditq_runtime.speed.hoist import _by_step, _elsewhere, _position
from ditq_runtime.speed.prepare import _chosen

STEPS = 4


@pytest.fixture(scope="module")
def folders(pipes, packed_folder, tmp_path_factory):
    """Packed folders, one of them with timestep groups."""
    root = tmp_path_factory.mktemp("grouped")
    stats = calibrate(pipes["own"], root / "stats", steps=STEPS, samples=2, quiet=True)
    recipe = Recipe("htg", "w8", "token", num_groups=3)
    packed = convert(pipes["own"], recipe, stats, root / "packed", quiet=True)
    formats = packed.config.quantization_config.scheme.formats.values()
    assert max(layer_format.groups for layer_format in formats) == 3
    return {"plain": packed_folder("w8_token"), "grouped": root / "packed"}


def _open(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sample(pipe, labels=(3, 7), guidance=1.5, steps=STEPS):
    generator = torch.Generator().manual_seed(0)
    result = pipe(list(labels), guidance, generator, num_inference_steps=steps, output_type="np")
    return torch.from_numpy(result.images)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_one_compiled_graph_serves_all_steps_and_groups(folders):
    model, graphs = _open(folders["grouped"]).transformer, []
    inputs = {"hidden_states": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))}
    inputs["class_labels"] = torch.tensor([3, 1000])

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    groups = set()
    for times in ((999, 999), (500, 1), (1, 999), (500, 500)):
        told = {**inputs, "timestep": torch.tensor(times)}
        with torch.no_grad():
            assert torch.equal(compiled(**told).sample, model(**told).sample)
        groups |= set(model.transformer_blocks[0].timestep_groups(told["timestep"]).tolist())
    torch.compiler.reset()
    assert groups == {0, 1, 2}
    assert len(graphs) == 1


@pytest.fixture(scope="module")
def pixarts(pixart, tmp_path_factory):
    """Width -> a packed PixArt with three timestep groups; 96 is told resolution and aspect ratio."""
    root, made = tmp_path_factory.mktemp("pixart"), {}

    def get(width):
        if width not in made:
            case = pixart(width)
            plan = {"steps": STEPS, "samples": 2, "prompts": case.prompts, "quiet": True}
            plan |= {"height": 64, "width": 64}
            stats = calibrate(case.model, root / str(width), **plan)
            made[width] = convert(case.model, Recipe("htg", num_groups=3), stats, quiet=True)
        return made[width]

    return get


def _randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CAPTIONS = {
    "negative_prompt": None,
    "prompt_embeds": _randn(2, 6, 32, seed=2),
    "prompt_attention_mask": torch.tensor([[1] * 6, [1] * 2 + [0] * 4]),
    "negative_prompt_embeds": _randn(2, 6, 32, seed=3),
    "negative_prompt_attention_mask": torch.ones(2, 6, dtype=torch.long),
}


def _sample_pixart(model, steps=STEPS, prepared=False):
    """Latents of two guided samples, and what `prepare` installed."""
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = PixArtSigmaPipeline(None, None, None, model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    done = ditq.prepare(pipe) if prepared else None
    options = {
        "num_inference_steps": steps,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    return pipe(**CAPTIONS, latents=_randn(2, 1, 8, 8, seed=1), **options).images, done


@pytest.mark.usefixtures("row_by_row")
def test_hoisted_pixart_gives_the_same_bits(pixarts):
    model, rows, tables = pixarts(64), [], []
    expected, _ = _sample_pixart(model)
    shared, table = model.adaln_single.linear, model.transformer_blocks[1].scale_shift_table
    hooks = [
        module.register_forward_hook(lambda module, args, out, seen=seen: seen.append(len(out)))
        for module, seen in ((shared, rows), (table, tables))
    ]
    got, prepared = _sample_pixart(model, prepared=True)
    assert torch.equal(got, expected)
    # the warm-up's one row, then all steps of two guided samples at once
    assert rows == tables == [1, STEPS * 4]
    assert (prepared.hoist.tables, prepared.hoist.hits) == (1, STEPS)
    report = ditq.execution_report(model)
    assert report.totals["hoisted_blocks"] == 2
    assert "2 of 2 blocks fused, modulation of 2 hoisted, " in str(report)
    prepared.undo()
    assert ditq.execution_report(model).totals["hoisted_blocks"] == 0
    for hook in hooks:
        hook.remove()
    assert torch.equal(_sample_pixart(model)[0], expected)


@pytest.mark.usefixtures("row_by_row")
def test_conditions_of_pixart_are_noticed(pixarts):
    """Another resolution is another modulation; one that changes between two steps, too."""
    model = pixarts(96)
    batch = {
        "encoder_hidden_states": _randn(2, 6, 32, seed=2),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[64.0, 64.0], [32.0, 128.0]]),
            "aspect_ratio": torch.tensor([[1.0], [0.25]]),
        },
    }
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)

    def run():
        outputs = []
        for i, t in enumerate(scheduler.timesteps):
            if i == 2:
                batch["added_cond_kwargs"]["resolution"][0] = 512
            x = scheduler.scale_model_input(_randn(2, 1, 8, 8, seed=i), t)
            with torch.no_grad():
                outputs.append(model(x, timestep=t.expand(2), **batch).sample)
        batch["added_cond_kwargs"]["resolution"][0] = 64
        return torch.stack(outputs)

    expected = run()
    prepared = ditq.prepare(SimpleNamespace(transformer=model, scheduler=scheduler))
    assert torch.equal(run(), expected)
    assert (prepared.hoist.tables, prepared.hoist.hits) == (2, 3)
    prepared.undo()


def test_weights_on_another_device_are_not_hoisted(pixarts):
    model, cpu = pixarts(64), torch.device("cpu")
    assert not _elsewhere(list(model.transformer_blocks), cpu)
    assert _elsewhere(list(model.transformer_blocks), torch.device("cuda"))
    assert not _elsewhere([torch.nn.Linear(2, 2, device="meta")], cpu)  # loaded by its own hook


def test_a_timestep_is_found_by_its_place_or_its_value():
    steps = torch.tensor([900, 500, 100])
    assert [_position(steps, t) for t in steps] == [0, 1, 2]
    assert [_position(steps, t) for t in (500, torch.tensor(100), torch.tensor([900.0]))] == [
        1,
        2,
        0,
    ]
    assert _position(steps, 123) == _position(steps, torch.tensor(123)) == -1
    backward = torch.tensor([[900, 7], [500, 7]])[
        :, 0
    ]  # a place in memory is no place in the schedule
    assert [_position(backward, t) for t in backward] == [0, 1]


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("kind", ["plain", "grouped"])
def test_hoisted_modulation_gives_the_same_images(folders, kind):
    pipe = _open(folders[kind])
    expected = _sample(pipe), _sample(pipe, (5,), guidance=1.0, steps=2)
    prepared = ditq.prepare(pipe)
    assert torch.equal(_sample(pipe), expected[0])
    assert (prepared.hoist.tables, prepared.hoist.hits) == (1, STEPS)
    assert torch.equal(_sample(pipe, (5,), guidance=1.0, steps=2), expected[1])
    assert (prepared.hoist.tables, prepared.hoist.hits) == (2, STEPS + 2)
    prepared.undo()
    assert torch.equal(_sample(pipe), expected[0])


def test_modulation_linears_run_once_per_run_not_per_step(folders):
    pipe, rows = _open(folders["plain"]), []
    ditq.prepare(pipe)
    linear = pipe.transformer.transformer_blocks[1].norm1.linear
    linear.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    _sample(pipe)
    assert rows == [STEPS * 4]  # two samples, guided


@pytest.mark.parametrize("kind", ["plain", "grouped"])
def test_forwards_of_ones_own_compute_their_own_modulation(folders, forward, kind):
    pipe = _open(folders[kind])
    expected = forward(pipe.transformer)
    prepared = ditq.prepare(pipe)
    _sample(pipe)
    hits = prepared.hoist.hits
    assert torch.equal(forward(pipe.transformer), expected)
    # announced one timestep, called with others
    pipe.scheduler.scale_model_input(torch.zeros(1), pipe.scheduler.timesteps[1])
    assert torch.equal(forward(pipe.transformer), expected)
    pipe.scheduler.scale_model_input(torch.zeros(1), torch.tensor(123456))
    assert torch.equal(forward(pipe.transformer), expected)
    assert prepared.hoist.hits == hits


@pytest.mark.usefixtures("row_by_row")
def test_changed_labels_are_noticed(folders):
    """Also when the same tensor is changed in place between two steps."""
    pipe = _open(folders["plain"])
    labels = torch.tensor([3, 7])

    def run(pipe):
        outputs = []
        pipe.scheduler.set_timesteps(2)
        latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.scale_model_input(latents, t)
            with torch.no_grad():
                outputs.append(
                    pipe.transformer(x, timestep=t.expand(2), class_labels=labels).sample
                )
            labels[0] = 9
        labels[0] = 3
        return torch.stack(outputs)

    expected = run(pipe)
    prepared = ditq.prepare(pipe)
    assert torch.equal(run(pipe), expected)
    assert prepared.hoist.tables == 2


def test_modulation_with_an_adapter_is_computed_at_every_step(folders):
    """It may be switched while a run goes on; what was computed for all its steps would not know."""
    layer, generator = "transformer_blocks.0.norm1.linear", torch.Generator().manual_seed(0)
    state = {f"{layer}.lora_A.weight": torch.randn(4, 64, generator=generator)}
    state[f"{layer}.lora_B.weight"] = torch.randn(384, 4, generator=generator) * 0.05

    def switched(prepared):
        pipe, steps = _open(folders["grouped"]), []
        done = ditq.prepare(pipe) if prepared else None
        ditq.load_lora(pipe, state)
        assert ditq.execution_report(pipe.transformer).totals["hoisted_blocks"] == 0
        stock = pipe.scheduler.step

        def step(*args, **kwargs):
            steps.append(1)
            if len(steps) == STEPS // 2:
                ditq.set_lora(pipe, {})
            return stock(*args, **kwargs)

        pipe.scheduler.step = step
        images = _sample(pipe)
        del pipe.scheduler.step
        ditq.unload_lora(pipe)
        hoisted = ditq.execution_report(pipe.transformer).totals["hoisted_blocks"]
        assert hoisted == 2 * prepared
        return images, done, _sample(pipe)

    (plain, _, without), (images, done, after) = switched(False), switched(True)
    assert torch.equal(images, plain)
    assert not torch.equal(plain, without)
    assert done.hoist.hits == STEPS  # of the last run
    assert torch.allclose(after, without, rtol=0, atol=1e-5)


def test_other_weights_are_noticed(folders):
    pipe = _open(folders["plain"])
    done = ditq.prepare(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    told = {"class_labels": torch.tensor([3])}

    def forward():
        timestep = pipe.scheduler.timesteps[1]
        x = pipe.scheduler.scale_model_input(torch.ones(1, 1, 8, 8), timestep)
        with torch.no_grad():
            return pipe.transformer(x, timestep=timestep.expand(1), **told).sample

    before = forward()
    state = pipe.transformer.state_dict()
    name = "transformer_blocks.0.norm1.linear.weight_scale"
    pipe.transformer.load_state_dict({**state, name: 2 * state[name]})
    changed = forward()
    assert (done.hoist.hits, done.hoist.tables) == (2, 2)
    done.undo()
    assert not torch.equal(changed, before)
    assert torch.allclose(changed, forward(), rtol=0, atol=1e-5)


def test_a_failing_forward_leaves_nothing_behind(folders, forward):
    pipe = _open(folders["plain"])
    expected = forward(pipe.transformer)
    ditq.prepare(pipe)
    pipe.scheduler.set_timesteps(2)
    t = pipe.scheduler.timesteps[0]
    pipe.scheduler.scale_model_input(torch.zeros(1), t)
    with pytest.raises(RuntimeError), torch.no_grad():
        pipe.transformer(
            torch.zeros(2, 7, 8, 8), timestep=t.expand(2), class_labels=torch.tensor([1, 2])
        )
    assert torch.equal(forward(pipe.transformer), expected)


def test_what_cannot_be_prepared_is_refused(folders, pipes):
    pipe = _open(folders["plain"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"needs a CUDA GPU, and the transformer is on cpu"):
            ditq.prepare(pipe, cuda_graph=True)
    with pytest.raises(ValueError, match="give a pipeline, not a model"):
        ditq.prepare(pipe.transformer)
    with pytest.raises(ValueError, match="has no integer linears"):
        ditq.prepare(pipes["own"])
    prepared = ditq.prepare(pipe)
    with pytest.raises(ValueError, match="is prepared already"):
        ditq.prepare(pipe)
    prepared.undo()
    prepared.undo()
    ditq.prepare(pipe)


def test_switches(folders, pipes, processor):
    processor(avx2=False)
    model = _open(folders["plain"]).transformer
    with pytest.raises(
        ValueError, match=r"linear='cpu' needs torch with oneDNN on a processor with"
    ):
        ditq.configure(model, linear="cpu")
    assert ditq.configure(model) == "reference"
    processor(avx_vnni=True)
    assert ditq.configure(model) == "cpu"
    assert ditq.configure(model, linear="reference") == "reference"
    assert ditq.configure(model) == "reference"  # as it is
    for options, sentence in (
        ({"linear": "triton"}, "linear='triton' needs CUDA tensors, and these are on cpu"),
        ({"linear": "cuda"}, "must be one of auto, reference, cpu, triton, got 'cuda'"),
        ({"attention": "sage"}, "attention must be one of auto, native, int8, bf16, got 'sage'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ditq.configure(model, **options)
    with pytest.raises(ValueError, match="has no integer linears"):
        ditq.configure(pipes["own"].transformer)
    assert ditq.configure(model, linear="auto") == "cpu"


@pytest.mark.parametrize("dot_products", [True, False])
def test_int4_weights_are_resident_once_on_a_cpu_unless_copies_are_asked_for(
    packed_folder, processor, dot_products
):
    processor(avx_vnni=dot_products)
    folder = packed_folder("w4p_token")
    model = _open(folder).transformer
    stored = sum(p.stat().st_size for p in (folder / "transformer").glob("*.safetensors"))
    before = k.copied_bytes()
    forward_once(model)
    assert k.copied_bytes() == before
    embedder = sum(
        p.numel() * p.element_size()
        for block in model.transformer_blocks[1:]
        for p in block.norm1.emb.parameters()
    )  # a file has it once
    assert model.get_memory_footprint() - embedder <= 1.03 * stored
    ditq.configure(model, copies=True)
    forward_once(model)
    assert k.copied_bytes() > before
    ditq.configure(model, copies=False)
    assert k.copied_bytes() == 0


def forward_once(model):
    with torch.no_grad():
        model(**family_of(type(model).__name__).example_inputs(model))


@pytest.mark.parametrize("fuse", [True, False])
def test_the_cpu_backend_gives_the_same_bits_and_the_report_names_it(folders, processor, fuse):
    pipe = _open(folders["grouped"])
    ditq.configure(pipe.transformer, fuse=fuse)
    outputs = []
    for features, backend in (
        ({"avx2": False}, "reference"),
        ({"avx2": True}, "cpu"),
        ({"avx_vnni": True}, "cpu"),
    ):
        processor(**features)
        assert ditq.configure(pipe.transformer, linear="auto") == backend
        outputs.append(_sample(pipe, steps=2))
        report = ditq.execution_report(pipe.transformer)
        assert {row.backend for row in report.layers if row.integer} == {backend}
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])


class _Replayed:
    """Stands in for a CUDA graph: replays one call on the memory that it was recorded with, into the same output."""

    def __init__(self, forward):
        self.forward = forward
        self.held = here().timestep, here().hoisted
        self.output = forward()

    def replay(self):
        here().timestep, here().hoisted = self.held
        for name, value in self.forward().items():
            self.output[name].copy_(value)
        here().timestep, here().hoisted = None, None

    def reset(self):
        self.forward = None


def test_a_captured_forward_reads_every_input_afresh(pixarts, monkeypatch):
    """Also conditions inside of a dictionary, the noted timestep and the hoisted modulation, at other addresses."""
    model, graphs = pixarts(96), []

    def record(forward, device):
        graphs.append(_Replayed(forward))
        return graphs[-1], graphs[-1].output

    monkeypatch.setattr("ditq_runtime.speed.cuda_graph._record", record)

    def call(seed):
        added = {"resolution": _randn(2, 2, seed=seed).abs() * 64, "aspect_ratio": torch.ones(2, 1)}
        with torch.no_grad():
            return model(
                _randn(2, 1, 8, 8, seed=seed),
                encoder_hidden_states=_randn(2, 6, 32, seed=seed),
                encoder_attention_mask=torch.ones(2, 6),
                timestep=torch.tensor([(10, 900), (900, 500), (500, 10)][seed]),
                added_cond_kwargs=added,
            ).sample

    places = [*model.transformer_blocks, model.adaln_single]

    def hoist(seed):
        """Another value than the modulation of the call."""
        pairs = zip(places, (6, 6, 7), strict=True)
        here().hoisted = {place: _randn(2, n * 96, seed=seed) for place, n in pairs}

    def calls():
        own = [call(seed) for seed in range(3)]
        for seed in range(2):
            hoist(seed)
            own.append(call(0))
            here().hoisted = None
        return torch.stack(own)

    expected = calls()
    assert len({tuple(x.flatten().tolist()) for x in expected}) == 5
    graphed = GraphedForward(model)
    assert torch.equal(calls(), expected)
    assert len(graphs) == 2
    graphed.remove()
    assert torch.equal(calls(), expected)


class Small(torch.nn.Module):
    """A model of one weight that says what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, scale=1, more=None):
        hoisted = sum((here().hoisted or {}).values())
        return (x * scale * self.weight + (more or {}).get("y", 0) + hoisted,)


@pytest.fixture
def small(monkeypatch):
    """A graphed `Small`, and the graphs that were captured."""
    graphs = []

    class Replay:
        def __init__(self, forward):
            self.forward, self.hoisted, self.freed = forward, here().hoisted, False
            self.output = forward()

        def replay(self):
            assert not self.freed
            before, here().hoisted = here().hoisted, self.hoisted
            self.output[0].copy_(self.forward()[0])
            here().hoisted = before

        def reset(self):
            self.freed = True

    def record(forward, device):
        graphs.append(Replay(forward))
        return graphs[-1], graphs[-1].output

    monkeypatch.setattr("ditq_runtime.speed.cuda_graph._record", record)
    model = Small()
    return model, GraphedForward(model), graphs


def test_graphs_of_shapes_that_were_not_used_for_longest_are_freed(small):
    model, graphed, graphs = small
    for size in (*range(1, KEPT + 1), 1, KEPT + 1):
        assert torch.equal(model(torch.full((size,), 2.0))[0], torch.full((size,), 2.0))
    assert len(graphs) == KEPT + 1
    assert [graph.freed for graph in graphs] == [False, True, *[False] * (KEPT - 1)]
    graphed.remove()
    assert all(graph.freed for graph in graphs)
    assert "forward" not in vars(model)


def test_a_graph_is_of_the_arguments_that_are_no_tensors_and_of_where_the_weights_are(small):
    model, _, graphs = small
    x = torch.ones(2)
    calls = [
        ((x,), {}),
        ((x, 2), {}),
        ((x,), {"scale": 2}),
        ((x,), {"more": {"y": x}}),
        ((x, True), {}),
    ]
    for _ in range(2):
        found = [model(*args, **kwargs)[0].tolist() for args, kwargs in calls]
        assert found == [[1, 1], [2, 2], [2, 2], [2, 2], [1, 1]]
    assert len(graphs) == len(calls)
    model.weight.data = torch.full((1,), 3.0)
    assert model(x)[0].tolist() == [3, 3]
    assert len(graphs) == len(calls) + 1


def test_hoisted_rows_are_copied_as_one_memory(small, monkeypatch):
    model, _, graphs = small
    copied, places = [], [Small(), Small()]
    copy = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda to, of: copied.append(len(to)) or copy(to, of)
    )
    rows = _by_step(places, [torch.arange(8.0).view(4, 2), torch.arange(8.0).view(4, 2)], steps=2)
    assert [list(now.values())[1].tolist() for now in rows] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    for now in rows:
        here().hoisted = now
        (y,) = model(torch.zeros(2, 2))
        here().hoisted = None
        assert torch.equal(y, sum(now.values()))
    assert len(graphs) == 1
    assert copied == [2, 2]  # the input and the memory


def test_a_graph_that_need_not_help_is_timed_and_kept_where_it_does(small, monkeypatch):
    """Of two sets of shapes the graph of the second takes longer than 97 % of the time without."""
    model, graphed, graphs = small
    graphed.remove()
    graphed = GraphedForward(model, always=False)
    seconds = iter([0.03, 0.02, 0.025, 0.0194, 0.03, 0.02, *[0.02] * TIMED, *[0.0195] * TIMED])
    monkeypatch.setattr(cuda_graph, "_seconds", lambda call, device: next(seconds))
    for size in (1, 2, 1, 2):
        assert model(torch.full((size,), 2.0))[0].tolist() == [2.0] * size
    assert next(seconds, None) is None
    assert [graph.freed for graph in graphs] == [False, True]
    assert [str(one) for one in graphed.measured] == [
        "inputs [1]: graph 19.40 ms, 20.00 ms without; replayed",
        "inputs [2]: graph 19.50 ms, 20.00 ms without; not taken",
    ]
    graphed.remove()
    assert all(graph.freed for graph in graphs)


@pytest.mark.parametrize(
    ("architecture", "device", "asked", "expected"),
    [
        ("DiTTransformer2DModel", "cpu", (None, None), (True, False, False)),
        ("DiTTransformer2DModel", "cuda", (None, None), (True, False, True)),
        ("DiTTransformer2DModel", "cuda", (False, True), (False, True, False)),
        ("AuraFlowTransformer2DModel", "cuda", (None, None), (False, True, True)),
        ("AuraFlowTransformer2DModel", "cuda", (True, False), (False, False, True)),
        ("AuraFlowTransformer2DModel", "cpu", (None, None), (False, False, False)),
    ],
)
def test_what_is_chosen(architecture, device, asked, expected):
    """Hoist, compile, graph; a module without blocks stands for a family that has none which fuse."""
    family, place = family_of(architecture), torch.device(device)
    found = _chosen(torch.nn.Module(), family, place, *asked)
    assert tuple(taken for taken, _ in found.values()) == expected


def test_blocks_are_compiled_as_asked_and_undone(folders):
    pipe, seen = _open(folders["plain"]), []
    model = pipe.transformer
    model.compile_repeated_blocks = lambda **options: seen.append(options)
    model.transformer_blocks[0]._compiled_call_impl = model.transformer_blocks[0].forward
    prepared = ditq.prepare(pipe, compile=True)
    assert seen == [{"backend": "ditq", "fullgraph": True}]
    assert prepared.hoist is None
    assert "compile: yes, as asked" in str(prepared)
    prepared.undo()
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["plain", "grouped"])
def test_a_cuda_graph_gives_the_same_images(folders, kind, cost_of_sums):
    """A graph replays the kernels it recorded. Hoisted rows are summed in another batch: the 256 terms of the widest
    sum, each rounded to 2**-24, may move what is quantized by 2**-16."""

    def sample(model):
        pipe = _open(folders[kind])
        pipe.transformer = model
        return _sample(pipe)

    bound = cost_of_sums(lambda: _open(folders[kind]).transformer, sample, 256 * 2.0**-24)
    pipe = _open(folders[kind]).to("cuda")
    expected = _sample(pipe)
    prepared = ditq.prepare(pipe, cuda_graph=False)
    hoisted = _sample(pipe)
    prepared.undo()
    assert (hoisted - expected).norm() / expected.norm() < bound
    prepared = ditq.prepare(pipe, cuda_graph=True)
    for _ in range(2):  # captures, then replays
        assert torch.equal(_sample(pipe), hoisted)
    prepared.undo()
    assert torch.equal(_sample(pipe), expected)
