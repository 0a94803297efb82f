"""Tables on narrow terminals: names are cut, numbers never are."""

from __future__ import annotations

import re
import shlex

import pytest
from rich.cells import cell_len

from modelctl.cli.show.fitting import fitted, widths, without_spare, wrapped
from modelctl.core.pages import Column

COLUMNS = [
    Column("name", "name"),
    Column("type", spare=6),
    Column("output", spare=5),
    Column("params", "number"),
    Column("%", "number", spare=2),
    Column("buffers", "number", spare=3),
    Column("MACs", "number"),
    Column("%", "number", spare=1),
]


@pytest.mark.parametrize("width", [36, 48, 64, 80, 100, 140])
def test_names_are_cut_and_numbers_left_out_or_whole(width: int) -> None:
    rest = ["1x197x768", "28,348,416", "32.7", "1,234", "5.58 G", "31.8"]
    kind = "12 x NonDynamicallyQuantizableLinear"
    rows = [[f"encoder.layers.block_{i}.attention.out", kind, *rest] for i in range(3)]
    columns, cells = without_spare(COLUMNS, rows, width)
    heads = [column.name for column in columns]
    assert sum(max(map(len, column)) + 2 for column in zip(heads, *cells, strict=True)) - 2 <= width
    assert all("28,348,416" in row and "5.58 G" in row for row in cells)
    assert heads[0] == "name"
    if width == 140:
        assert columns == COLUMNS
    assert rows[0][0] == "encoder.layers.block_0.attention.out"


def test_the_least_of_two_that_can_be_spared_goes_first() -> None:
    rows = [["a", "b", "c", "1", "2", "3", "4", "5"]]
    width = sum(len(column.name) + 2 for column in COLUMNS) - 2
    assert without_spare(COLUMNS, rows, width)[0] == COLUMNS
    assert without_spare(COLUMNS, rows, width - 1)[0] == COLUMNS[:-1]


def test_texts_give_way_before_names_and_numbers_never() -> None:
    columns = [Column("name", "name"), Column("how"), Column("size", "bytes")]
    rows = [["n" * 30, "h" * 40, "123,456,789"]]
    assert widths(columns, rows, 100) == [30, 40, 11]
    assert widths(columns, rows, 60) == [29, 16, 11]
    assert widths(columns, rows, 40) == [15, 10, 11]
    assert sum(widths(columns, rows, 40)) + 2 * 2 == 40


@pytest.mark.parametrize("most", [20, 33, 60])
@pytest.mark.parametrize(
    "text",
    [
        "warning: 12,345,678 of 87,654,321 bytes are kept alive by 'layer1.0.weight' alone",
        "/a/path/that/is/long/and/has/no/blank/in/it/at/all/model-00001-of-00002.safetensors",
        "  removed: " + ", ".join(f"blocks.{i}.weight" for i in range(100, 109)),
        "名" * 50,
        "",
    ],
)
def test_lines_break_between_words_and_never_in_a_number(text: str, most: int) -> None:
    lines = wrapped(text, most, cell_len)
    assert all(cell_len(line) <= most for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    numbers = re.findall(r"\d[\d,]*", text)
    assert [n for line in lines for n in re.findall(r"\d[\d,]*", line)] == numbers


@pytest.mark.parametrize("most", [30, 40, 60])
@pytest.mark.parametrize("path", ["/somewhere/" + "far/" * 20 + "ddp.pt", "'my model.pt'", "a.pt"])
def test_a_command_on_several_lines_can_be_pasted(path: str, most: int) -> None:
    text = f"modelctl strip-prefix {path} --prefix module. -o NEW.pt"
    lines = wrapped(text, most, len, " \\")
    assert all(len(line) <= most for line in lines)
    assert all(line.endswith("\\") for line in lines[:-1])
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(text)


def test_what_all_names_begin_with_is_said_once() -> None:
    columns = [Column("name", "name"), Column("params", "count"), Column("buffers", "count", "-")]
    rows = [["module.net.conv1", "1,234", "-"], ["module.net.conv2", "5,678", "-"]]
    assert fitted(columns, rows, 80).under == ""
    found = fitted(columns, rows, 22)
    assert found.under == "module.net."
    assert [column.name for column in found.columns] == ["name", "params"]
    assert found.rows == [[["conv1"], ["1,234"]], [["conv2"], ["5,678"]]]
    assert fitted(columns, rows[:1], 22).under == ""


def test_lines_break_between_what_stands_by_itself() -> None:
    """Not in it: no count from what it counts, no number from its unit."""
    text = "model.pt   torch zip · state_dict · 185 tensors · 1.9 MB · read 47.5 kB, 0.1 s, none"
    assert wrapped(text, 80) == [
        "model.pt   torch zip · state_dict · 185 tensors · 1.9 MB ·",
        "  read 47.5 kB, 0.1 s, none",
    ]
    assert wrapped(" params 882,777 · 3.5 MB (stored 3.5 MB) · tied 0", 45) == [
        " params 882,777 · 3.5 MB (stored 3.5 MB) ·",
        "   tied 0",
    ]
    assert wrapped("? a state_dict does not record it     ~ inferred from names", 50) == [
        "? a state_dict does not record it",
        "  ~ inferred from names",
    ]
    # what is longer than a line breaks between words, and 23.1 kB is one
    assert wrapped("epoch 3 · optimizer AdamW, of 6 parameters, 23.1 kB", 32) == [
        "epoch 3 · optimizer AdamW, of 6",
        "  parameters, 23.1 kB",
    ]
    assert wrapped("the optimizer's state takes 23.1 kB", 32)[1] == "  23.1 kB"


def test_names_break_between_modules() -> None:
    assert wrapped("model.layers.0.self_attn.q_proj.weight", 25) == [
        "model.layers.0.self_attn.",
        "  q_proj.weight",
    ]
    assert wrapped("bert.embeddings.word_embeddings.weight", 22) == [
        "bert.embeddings.",
        "  word_embeddings.",
        "  weight",
    ]
    assert wrapped("a_name_without_modules", 12)[0] == "a_name_"


def test_names_are_cut_between_modules() -> None:
    columns = [Column("name", "name"), Column("kind")]
    name = "bert.encoder.layer.{0-11}.attention.self.query"
    _, cells = without_spare(columns, [[name, "12 x linear"]], 46)
    assert cells[0][0] == "….{0-11}.attention.self.query"
    _, cells = without_spare(columns, [[name, "12 x linear"]], 41)
    assert cells[0][0] == "…{0-11}.attention.self.query"
