"""Where a training stands in its data: cut anywhere, it goes on as if it had not been."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import RefusedError, UsageError

BATCHES = 5


class Rows(Dataset):
    def __len__(self) -> int:
        return 2 * BATCHES - 1  # the last batch is a smaller one

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([i / 9, 1.0, i**2 / 81])


class Stream(IterableDataset):
    """Says itself where it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self):
        while self.at < 9:
            self.at += 1
            yield torch.tensor([self.at / 9, 1.0, 0.5])
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def stateful():
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader


@pytest.fixture(autouse=True)
def as_torchdata_is():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        warnings.filterwarnings("ignore", message="Neither dataset nor iter")
        yield


class Training:
    """A model with dropout, an optimizer, a loader and a generator of its own."""

    def __init__(self, make, seed: int) -> None:
        torch.manual_seed(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.loader = make(seed)

    @property
    def parts(self):
        own = {"augment": self.noise}
        trained = {"model": self.model, "optimizer": self.optimizer}
        return {**trained, "loader": self.loader, "generators": own}

    def losses(self, first: int, last: int, cut: tuple[int, int] | None, path) -> list[float]:
        """Losses until the cut: (epoch, batches of it that are done)."""
        found = []
        for epoch in range(first, last):
            if cut == (epoch, 0):
                mnn.save_checkpoint(path, **self.parts, epoch=epoch)
                return found
            for done, rows in enumerate(self.loader, 1):
                self.optimizer.zero_grad()
                rows = rows + torch.rand(rows.shape, generator=self.noise)
                loss = self.model(rows).square().mean()
                loss.backward()
                self.optimizer.step()
                found.append(loss.item())
                if cut == (epoch, done):
                    mnn.save_checkpoint(path, **self.parts, epoch=epoch)
                    return found
        return found


def compared(make, cut, path) -> None:
    whole = Training(make, 0).losses(0, 3, None, path)
    before = Training(make, 0).losses(0, 3, cut, path)
    assert before == whole[: len(before)] != []
    again = Training(make, 77)  # nothing is as it was but what the file brings
    state = mnn.resume(path, **again.parts)
    assert "loader" in state.restored
    assert not state.extra
    torch.load(path, weights_only=True)
    assert again.losses(state.epoch, 3, None, path) == whole[len(before) :]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [(0, 1), (1, 0), (1, 3), (1, 5), (2, 4)], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["generator", "global"])
def test_the_cut_run_has_the_losses_of_the_uncut_one(tmp_path, workers, cut, own):
    kind = stateful()

    def make(seed: int):
        given = {"generator": torch.Generator().manual_seed(seed)} if own else {}
        return kind(Rows(), 2, shuffle=True, num_workers=workers, **given)

    compared(make, cut, tmp_path / "a.pt")


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_persist(tmp_path, workers):
    kind = stateful()

    def make(seed: int):
        return kind(Rows(), 2, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    for cut in ((0, 2), (1, 0), (1, 3)):
        compared(make, cut, tmp_path / "a.pt")


def test_other_orders_and_a_dataset_with_a_state(tmp_path):
    kind = stateful()
    for cut in ((1, 2), (2, 0)):
        compared(lambda seed: kind(Stream(), 2), cut, tmp_path / "a.pt")
        compared(lambda seed: kind(Rows(), 2), cut, tmp_path / "a.pt")


def test_a_sampler_that_cannot_say_its_order(tmp_path):
    kind = stateful()

    def make(seed: int):
        own = torch.Generator().manual_seed(seed)
        return kind(Rows(), 2, sampler=RandomSampler(Rows(), replacement=True, generator=own))

    compared(make, (2, 0), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="after 2 batches, and a RandomSampler can't say"):
        Training(make, 0).losses(0, 3, (1, 2), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="another order; shuffle=True"):
        mnn.resume(tmp_path / "a.pt", **Training(make, 1).parts)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("own", [True, False], ids=["generator", "global"])
def test_a_plain_loader_is_exact_between_epochs(tmp_path, workers, own):
    def make(seed: int):
        given = {"generator": torch.Generator().manual_seed(seed)} if own else {}
        return DataLoader(Rows(), 2, shuffle=True, num_workers=workers, **given)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cut in ((1, 0), (2, 0)):
            compared(make, cut, tmp_path / "a.pt")


def test_a_plain_loader_within_an_epoch_says_so_both_times(tmp_path):
    def make(seed: int):
        return DataLoader(Rows(), 2, shuffle=True)

    with pytest.warns(UserWarning, match="after 3 batches.*StatefulDataLoader.*islice"):
        Training(make, 0).losses(0, 3, (1, 3), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="saved after 3 batches.*begins a new one"):
        mnn.resume(tmp_path / "a.pt", **Training(make, 1).parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_only_a_loop_that_goes_on_is_within_an_epoch(net, tmp_path, workers):
    for data in (Rows(), Stream()):
        loader = DataLoader(data, 2, num_workers=workers, persistent_workers=workers > 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mnn.save_checkpoint(tmp_path / "a.pt", model=net, loader=loader)
            for _ in loader:
                pass
            mnn.save_checkpoint(tmp_path / "a.pt", model=net, loader=loader)
        at_work = iter(loader)
        next(at_work)
        with pytest.warns(UserWarning, match="after 1 batches"):
            mnn.save_checkpoint(tmp_path / "a.pt", model=net, loader=loader)


def test_several_loaders_and_a_sampler_with_a_state(net, tmp_path):
    class Sampler:
        def __init__(self) -> None:
            self.at = 0

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state) -> None:
            self.at = state["at"]

    kind, mine = stateful(), Sampler()
    mine.at = 7
    train = kind(Rows(), 2, shuffle=True)
    left = iter(train)
    next(left)
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, loader={"train": train, "own": mine})
    again, other = kind(Rows(), 2, shuffle=True), Sampler()
    mnn.resume(tmp_path / "a.pt", model=net, loader={"own": other, "train": again})
    assert other.at == 7
    assert [*map(torch.Tensor.tolist, again)] == [*map(torch.Tensor.tolist, left)]
    with pytest.raises(RefusedError, match="loader"):
        mnn.resume(tmp_path / "a.pt", model=net, loader={"eval": other})


def test_rng_stays_where_it_is_not_wanted(net, tmp_path):
    loader = stateful()(Rows(), 2, shuffle=True)
    next(iter(loader))
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, loader=loader)
    before = torch.get_rng_state()
    mnn.resume(tmp_path / "a.pt", model=net, loader=loader, rng=False)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_missing_and_what_is_not_asked_for(net, tmp_path):
    made = torch.Generator().manual_seed(3)
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, generators={"a": made})
    assert "loader" in mnn.resume(tmp_path / "a.pt", model=net).unused
    with pytest.warns(UserWarning, match="not in the checkpoint: generator 'b'"):
        state = mnn.resume(tmp_path / "a.pt", model=net, generators={"b": torch.Generator()})
    assert state.unused == ("generator 'a'",)
    mnn.save_checkpoint(tmp_path / "b.pt", model=net)
    with pytest.warns(UserWarning, match="not in the checkpoint: loader"):
        mnn.resume(tmp_path / "b.pt", model=net, generators={"a": made})


def test_nothing_is_changed_where_it_does_not_fit(net, tmp_path):
    kind = stateful()
    loader = kind(Rows(), 2, num_workers=0)
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, loader=loader)
    before = net.fc.weight.detach().clone()
    with torch.no_grad():
        net.fc.weight.add_(1)
    with pytest.raises(RefusedError, match="num_workers=0, and has 2"):
        mnn.resume(tmp_path / "a.pt", model=net, loader=kind(Rows(), 2, num_workers=2))
    whole = torch.load(tmp_path / "a.pt", weights_only=True)
    whole["loader"] = {"generators": {"a": torch.zeros(3, dtype=torch.uint8)}}
    torch.save(whole, tmp_path / "b.pt")
    with pytest.raises(RefusedError, match="generator 'a'"):
        mnn.resume(tmp_path / "b.pt", model=net, generators={"a": torch.Generator()})
    assert torch.equal(net.fc.weight, before + 1)


def test_a_place_that_a_plain_loader_cannot_take(net, tmp_path):
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, loader=stateful()(Rows(), 2))
    with pytest.warns(UserWarning, match="a DataLoader can't take it"):
        mnn.resume(tmp_path / "a.pt", model=net, loader=DataLoader(Rows(), 2))


def test_another_scripts_own_state_of_its_loader(net, tmp_path):
    kind = stateful()
    loader = kind(Rows(), 2, shuffle=True)
    left = iter(loader)
    next(left)
    torch.save({"model": net.state_dict(), "dataloader": loader.state_dict()}, tmp_path / "a.pt")
    again = kind(Rows(), 2, shuffle=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = mnn.resume(tmp_path / "a.pt", model=net, loader=again, rng=False)
    assert [*map(torch.Tensor.tolist, again)] == [*map(torch.Tensor.tolist, left)]
    assert "dataloader" in state.extra  # the script's own value, as ever


def test_what_is_no_loader_is_refused(net, tmp_path):
    with pytest.raises(UsageError, match="loader is a list_iterator"):
        mnn.save_checkpoint(tmp_path / "a.pt", model=net, loader=iter([]))
    with pytest.raises(UsageError, match="generators: 'a' is a int"):
        mnn.save_checkpoint(tmp_path / "a.pt", model=net, generators={"a": 3})


def test_file_commands_know_it_and_edits_carry_it_along(net, tmp_path):
    loader = DataLoader(Rows(), 2, shuffle=True, generator=torch.Generator().manual_seed(3))
    mnn.save_checkpoint(
        tmp_path / "a.pt", model=net, loader=loader, generators={"weight": torch.Generator()}
    )
    with mc.open(tmp_path / "a.pt") as ckpt:
        assert ckpt.sections.loader[0] == ("loader",)
        assert [one.path for one in ckpt.sections.models] == [("model",)]
    rows = mc.ls(tmp_path / "a.pt", section="all").as_dict()["tensors"]
    assert {row["name"] for row in rows if row["section"] == "loader"} == {
        "loader.loaders.generators.generator",
        "loader.generators.weight",
    }
    mc.edit(tmp_path / "a.pt", [{"do": "drop", "pattern": "fc"}], output=tmp_path / "b.pt")
    before, after = (torch.load(tmp_path / f"{one}.pt", weights_only=True) for one in "ab")
    assert not any(name.startswith("fc") for name in after["model"])
    assert str(before["loader"]) == str(after["loader"])


@pytest.mark.parametrize("given", [torch.Generator(), [torch.Generator()]])
def test_generators_without_a_name_are_refused_by_both(tmp_path, net, given):
    with pytest.raises(UsageError, match=r"generators takes a dict of names, not .*") as e:
        mnn.save_checkpoint(tmp_path / "a.pt", model=net, generators=given)
    assert e.value.hint == "generators={'noise': generator}"
    mnn.save_checkpoint(tmp_path / "a.pt", model=net)
    with pytest.raises(UsageError, match=r"generators takes a dict of names, not .*"):
        mnn.resume(tmp_path / "a.pt", model=net, generators=given)
