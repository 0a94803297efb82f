"""Write the orders in which modules have their parameters: python docs/make_orders.py

Every architecture of the installed transformers and torchvision, and two of each of timm's
families, are built on meta. What stands directly below a module and has parameters, with what the
module is called, is a set; its order is that of ``named_parameters()``. What can't be built is
named. core/matching/module_order.py reads the file.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a config that wants a hub's backbone is left out

import timm
import torch
import torchvision
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modelctl.core.matching.module_order import labelled, ordered, tree_of

ORDERS = Path(__file__).parents[1] / "src/modelctl/core/matching/module_orders.json.gz"
# Where a config says how many layers there are: heads are built on few of them.
DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer")

Order = tuple[str, ...]  # what a module is called, and what is below it


def orders(model: nn.Module) -> set[Order]:
    """The orders of all modules with several names below them, under their names in the model and
    under those with which transformers saves it."""
    names = [name for name, _ in model.named_parameters()]
    found = set(orders_of(names))
    saved = saved_names(model)
    if saved is not None and saved != names:
        found.update(orders_of(saved))
    return found


def orders_of(names: list[str]) -> list[Order]:
    tree = tree_of(names)
    found = []
    for label, below in labelled(tree):
        if len(below) > 1 and not all(map(str.isdecimal, below)):
            found.append((label, *below))
    numbered = {(label, frozenset(below)): below for label, *below in found}
    if len(numbered) == len(found) and [*ordered(tree, numbered)] != names:
        print(f"left out: not in the order of its modules: {names[0]}, ...")
        return []
    return found


def saved_names(model: nn.Module) -> list[str] | None:
    """What transformers calls the parameters in a file, where it only renames them."""
    parameters = dict(model.named_parameters())
    try:
        saved = revert_weight_conversion(model, dict(parameters))
    except Exception:  # it makes others of them, or is no model of transformers
        return None
    called = {id(one): name for name, one in saved.items()}
    names = [called.get(id(one)) for one in parameters.values()]
    return None if None in names else names


def of_transformers(only: Iterable[str] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Each architecture with each of its heads: (model_type, model)."""
    classes: dict[str, dict[str, None]] = {}
    for attribute, mapping in vars(modeling_auto).items():
        if attribute.startswith("MODEL") and attribute.endswith("_MAPPING_NAMES"):
            for model_type, names in mapping.items():
                several = names if isinstance(names, (tuple, list)) else (names,)
                classes.setdefault(model_type, {}).update(dict.fromkeys(several))
    for model_type in sorted(classes) if only is None else only:
        for i, name in enumerate(classes[model_type]):
            for few in (False,) if i == 0 else (True, False):
                try:
                    config = CONFIG_MAPPING[model_type]()
                    if few:
                        shorten(config)
                    with torch.device("meta"):
                        model = getattr(transformers, name)._from_config(config)
                except (Exception, AssertionError) as e:  # what asks for another library, or a hub
                    print(f"left out: {name}: {type(e).__name__} {e}"[:150])
                    continue
                yield model_type, model
                break


def shorten(config: Any) -> None:
    for name in DEPTHS:
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > 4:
            setattr(config, name, 4)


def of_torchvision(only: Iterable[str] | None = None) -> Iterator[tuple[str, nn.Module]]:
    for name in torchvision.models.list_models() if only is None else only:
        for options in ({"weights_backbone": None}, {"init_weights": False}, {}):
            try:
                with torch.device("meta"):
                    model = torchvision.models.get_model(name, weights=None, **options)
            except TypeError:  # no such option
                continue
            except NotImplementedError as e:  # it computes with its weights
                print(f"left out: {name}: {e}")
                break
            yield f"torchvision:{name}", model
            break


def of_timm(only: Iterable[str] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The first two models of each of timm's modules."""
    for module in timm.list_modules() if only is None else only:
        for name in timm.list_models(module=module)[:2]:
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except Exception as e:
                print(f"left out: {name}: {type(e).__name__} {e}"[:150])
                continue
            yield f"timm:{module}", model


def make(models: Iterable[tuple[str, nn.Module]]) -> dict[str, Any]:
    """What the file says: the orders, and which of them each architecture has."""
    having: dict[str, set[Order]] = {}
    for name, model in models:
        having.setdefault(name, set()).update(orders(model))
    known = sorted(set().union(*having.values()))
    number = {order: i for i, order in enumerate(known)}
    return {
        "made_of": {
            one.__name__: one.__version__.partition("+")[0]
            for one in (transformers, torchvision, timm)
        },
        "orders": known,
        "architectures": {
            name: sorted(map(number.__getitem__, found)) for name, found in sorted(having.items())
        },
    }


def everything() -> Iterator[tuple[str, nn.Module]]:
    yield from of_torchvision()
    yield from of_timm()
    yield from of_transformers()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable()
    text = json.dumps(make(everything()), separators=(",", ":"))
    # no time in it: the same models make the same file
    ORDERS.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{ORDERS}: {ORDERS.stat().st_size:,} bytes")
