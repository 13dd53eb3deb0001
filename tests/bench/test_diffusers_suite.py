"""diffusers' own tests, where their source is; and the harness that runs them, without it."""

import re

import diffusers
import pytest
import torch

from ditq_bench.diffusers_suite import command
from ditq_bench.diffusers_suite.applies import NOT_APPLICABLE
from ditq_bench.diffusers_suite.plugin import quantized
from ditq_runtime import QuantLinear

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 1, "num_layers": 1, "sample_size": 8,
    "patch_size": 2, "num_embeds_ada_norm": 3,
}  # fmt: skip


def test_diffusers_own_tests_pass_or_do_not_apply():
    tree = command.source()
    if tree is None:
        pytest.skip(command.MISSING)
    outcomes = command.run(tree)
    failed = {test: why for test, (outcome, why) in outcomes.items() if outcome == "failed"}
    assert failed == {}
    assert sum(outcome == "passed" for outcome, _ in outcomes.values()) > 100


def test_without_their_source_a_sentence_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv(command.SOURCE, raising=False)
    assert command.main([]) == 0
    assert command.MISSING in capsys.readouterr().out
    monkeypatch.setenv(command.SOURCE, str(tmp_path))
    assert command.source() is None
    (tmp_path / "tests" / "models" / "testing_utils").mkdir(parents=True)
    assert command.source() == tmp_path


def test_their_class_makes_quantized_models_and_loads_as_ever(tmp_path):
    cls = quantized(diffusers.DiTTransformer2DModel)
    assert issubclass(cls, diffusers.DiTTransformer2DModel)
    model = cls(**SIZES)
    assert type(model) is diffusers.DiTTransformer2DModel
    assert isinstance(model, cls)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_reasons_are_patterns_and_sentences():
    for pattern, reason in NOT_APPLICABLE:
        re.compile(pattern)
        assert len(reason.split()) > 4
    assert command.kind_of("skipped", "not applicable: x") == "not applicable"
    assert command.kind_of("skipped", "test requires a hardware accelerator") == "skipped"
