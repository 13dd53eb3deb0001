"""The compact form of the demo transformer."""

import pytest
import torch

from ditq_converters.demo.architecture import (
    NULL_LABEL,
    build_scheduler,
    build_transformer,
    compact,
    expand,
    tie_embedders,
)

EMBEDDER = ".norm1.emb."


@pytest.fixture
def tied():
    torch.manual_seed(0)
    transformer = build_transformer()
    tie_embedders(transformer)
    return transformer


def _predict(transformer, labels):
    x = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.arange(len(labels)) * 70
    with torch.no_grad():
        return transformer(x, timestep=timesteps, class_labels=torch.tensor(labels)).sample


def test_expanding_the_compact_form_restores_the_function(tied):
    restored = build_transformer()
    restored.load_state_dict(expand(compact(tied.state_dict())))  # strict
    labels = [*range(10), NULL_LABEL]
    assert torch.equal(_predict(restored, labels), _predict(tied, labels))


def test_compact_undoes_expand(tied):
    small = compact(tied.state_dict())
    again = compact(expand(small))
    assert again.keys() == small.keys()
    assert all(torch.equal(again[key], small[key]) for key in small)


def test_the_compact_form_holds_one_embedder_of_eleven_labels(tied):
    small = compact(tied.state_dict())
    embedder = {key: tuple(value.shape) for key, value in small.items() if "embedder" in key}
    assert embedder == {
        "embedder.timestep_embedder.linear_1.weight": (128, 256),
        "embedder.timestep_embedder.linear_1.bias": (128,),
        "embedder.timestep_embedder.linear_2.weight": (128, 128),
        "embedder.timestep_embedder.linear_2.bias": (128,),
        "embedder.class_embedder.embedding_table.weight": (11, 128),
    }


def test_untrained_labels_are_unconditional(tied):
    restored = build_transformer()
    restored.load_state_dict(expand(compact(tied.state_dict())))
    expected = _predict(restored, [NULL_LABEL] * 3)
    assert torch.equal(_predict(restored, [10, 500, 999]), expected)


def test_expanded_blocks_share_no_memory(tied):
    state = expand(compact(tied.state_dict()))
    copies = [value for key, value in state.items() if EMBEDDER in key]
    assert len({value.data_ptr() for value in copies}) == len(copies) == 6 * 5


def test_compact_refuses_embedders_that_differ():
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.norm1\.emb.*differs"):
        compact(build_transformer().state_dict())


def test_the_noise_schedule_is_the_linear_one_of_dit():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = torch.cumprod(1 - betas, dim=0)
    scheduler = build_scheduler()
    # 1000 fp32 products: at most 1000 roundings of 2**-24
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=6e-5, atol=0)
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.final_alpha_cumprod == 1
