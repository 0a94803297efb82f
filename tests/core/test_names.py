"""Whether names are sorted, or in a model's order."""

from __future__ import annotations

import pytest
import torchvision

from modelctl.core.names import alphabetical


@pytest.mark.parametrize(
    ("names", "is_sorted"),
    [
        ([], False),
        (["a"], False),
        (["bias", "weight"], True),  # torch's own order, or sorted: nothing is claimed
        (["weight", "bias"], False),
        (["a", "b", "c"], True),
        (["fc.weight", "fc.bias", "zz.weight"], False),
        ([*"abcdefghijk", "a"], True),  # one dtype after the other
    ],
)
def test_sorted_names(names: list[str], is_sorted: bool) -> None:
    assert alphabetical(names) is is_sorted


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "swin_t", "densenet121", "alexnet"])
def test_models_have_an_order_of_their_own(name: str) -> None:
    names = list(torchvision.models.get_model(name).state_dict())
    assert not alphabetical(names)
    assert alphabetical(sorted(names))
    half = len(names) // 2
    assert alphabetical([*sorted(names[:half]), *sorted(names[half:])])
    first = names[0].partition(".")[0]
    renamed = [n.replace(first, "zz", 1) if n.startswith(first) else n for n in sorted(names)]
    assert alphabetical(renamed)  # in the order that they had under their old names
    assert not alphabetical(
        [n.replace(first, "zz", 1) if n.startswith(first) else n for n in names]
    )


def test_a_name_of_many_segments_takes_the_time_of_its_length() -> None:
    deep = "a." * 100_000 + "weight"
    assert alphabetical([deep, "b.weight", "b.bias"]) is False
