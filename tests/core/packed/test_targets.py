"""What a config's targets mean, beside Python's own regular expressions; and those that are made to
take for ever."""

from __future__ import annotations

import re

import pytest

from modelctl.core.packed.targets import Targets

MODULES = [
    *("lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj"),
    *("model.layers.10.mlp.gate", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"),
    *("vision.blocks.0.attn", "model.layers.0.mlp.experts.3.up_proj"),
]


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            ".*",
            ".*self_attn.*",
            ".*lm_head",
            "model.layers.*",
            ".*(q|k|v)_proj$",
            "lm_head|vision.*",
        ),
        *(
            r".*mlp\.gate$",
            r"model\.layers\.[01]\..*",
            "^model.*down_proj$",
            ".*(?:up|down)_proj.*",
        ),
        *("visual.*", ".*experts.*up.*", "model", "layers"),
    ],
)
def test_patterns_as_makers_write_them(pattern: str) -> None:
    targets = Targets([f"re:{pattern}"])
    for module in MODULES:
        assert targets.match(module) is (re.match(pattern, module) is not None), module


def test_paths() -> None:
    targets = Targets(["lm_head", "model.layers.1", "q_proj", 7])
    found = {module for module in MODULES if targets.match(module)}
    assert found == {
        *("lm_head", "model.layers.0.self_attn.q_proj"),
        *("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"),
    }


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*$", "(.*a){20}", "a?" * 30 + "a" * 30, "(", "(a)\\1+"]
)
def test_what_may_take_for_ever_is_not_understood(pattern: str) -> None:
    assert not Targets([f"re:{pattern}"]).match("a" * 60 + "!")
