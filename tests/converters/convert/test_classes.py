"""Classes of a DiT: which are different, and calls that ask all of them; by hand."""

import torch

from ditq_converters.calibrate.transformer_calls import TransformerCall
from ditq_converters.convert.classes import ask_all_classes, class_table, different_classes


def test_untrained_classes_count_once():
    table = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 2.0], [0.0, 0.0], [1.0, 2.0]])
    assert different_classes(table).tolist() == [0, 1, 2]


def calls_of(*labels):
    latents = torch.arange(4.0)
    return [
        TransformerCall("transformer", 5.0, (latents,), {"class_labels": torch.tensor(one), "timestep": 5.0})
        for one in labels
    ]  # fmt: skip


def test_every_class_is_asked_and_samples_without_one_stay(make_dit):
    """Six trained classes, one that is embedded as none; four samples with a class and four without in each call."""
    model = make_dit(2, num_embeds_ada_norm=7)
    table, none = class_table(model)
    assert (len(table), none) == (8, 7)
    for block in model.transformer_blocks:
        rows = block.norm1.emb.class_embedder.embedding_table.weight
        rows[3] = rows[none]
    given = calls_of(*[[0, 0, 1, 1, none, none, none, none]] * 8)
    asked = ask_all_classes(model, given)
    labels = torch.stack([one.kwargs["class_labels"] for one in asked])
    assert (labels[:, 4:] == none).all()
    times = labels[:, :4].flatten().bincount(minlength=none).tolist()
    # 32 multiples of the golden ratio: in a sixth of [0, 1) are five or six, give or take two
    assert times.pop(3) == 0
    assert all(3 <= count <= 8 for count in times)
    assert all(one.args is other.args for one, other in zip(asked, given, strict=True))
    assert given[0].kwargs["class_labels"].tolist() == [0, 0, 1, 1] + [none] * 4


def test_calls_without_classes_are_left_alone(make_dit):
    one = TransformerCall("transformer", 5.0, (), {"timestep": 5.0})
    assert ask_all_classes(make_dit(2), [one]) == [one]
    given = calls_of([0, 1])
    assert ask_all_classes(torch.nn.Linear(1, 1), given) == given
