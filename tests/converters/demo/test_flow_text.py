"""The flow model's tokenizers and frozen text encoders."""

import pytest
import torch

from ditq_converters.demo.digits import DIGIT_NAMES
from ditq_converters.demo.flow.pipeline import load_flow
from ditq_converters.demo.flow.text import (
    TEMPLATES,
    TEXT_WIDTH,
    TRAINED_TOKENS,
    build_tokenizers,
    draw_encoders,
)


@pytest.mark.parametrize(
    ("prompt", "clip", "t5"),
    [
        ("", [], []),
        ("seven", ["seven</w>"], ["▁seven"]),
        ("the digit nine", ["the</w>", "digit</w>", "nine</w>"], ["▁the", "▁digit", "▁nine"]),
        ("a q", ["a</w>", "<unk>"], ["▁a", "<unk>"]),
    ],
)
def test_words_are_one_token_each(prompt, clip, t5):
    one, two = build_tokenizers()
    begin, end = "<|startoftext|>", "<|endoftext|>"
    assert one.convert_ids_to_tokens(one(prompt).input_ids) == [begin, *clip, end]
    assert two.convert_ids_to_tokens(two(prompt).input_ids) == [*t5, "</s>"]


def test_every_trained_prompt_leaves_room_for_a_padding():
    _, t5 = build_tokenizers()
    prompts = [form.format(name) for name in DIGIT_NAMES for form in TEMPLATES]
    ids = t5(prompts).input_ids
    assert max(len(row) for row in ids) == TRAINED_TOKENS - 1
    unknown = t5.convert_tokens_to_ids("<unk>")
    assert not any(unknown in row for row in ids)


@torch.no_grad()
def test_the_seed_decides_encoders_that_fp16_holds_exactly():
    first, same, other = (draw_encoders(seed) for seed in (0, 0, 1))
    for encoder, again, else_where in zip(first, same, other, strict=True):
        for name, tensor in encoder.named_parameters():
            assert torch.equal(tensor, tensor.half().float())
            assert torch.equal(tensor, again.get_parameter(name))
        assert any(
            not torch.equal(tensor, else_where.get_parameter(name))
            for name, tensor in encoder.named_parameters()
        )


@torch.no_grad()
def test_the_packaged_encoders_tell_digits_apart_and_paddings_are_one_vector():
    pipe = load_flow()
    text, pooled, ids = pipe.encode_prompt(list(DIGIT_NAMES), max_sequence_length=7)
    assert text.shape == (10, 7, TEXT_WIDTH)
    assert pooled.shape == (10, TEXT_WIDTH)
    assert not ids.any()  # Flux gives text no position
    for said in (text[:, 0], pooled):
        distances = torch.cdist(said, said) + 99 * torch.eye(10)
        assert distances.min() > 0.1 * said.norm(dim=1).mean()
    assert torch.equal(text[:, 2:], text[:1, 2:3].expand(10, 5, TEXT_WIDTH))  # after word and end
