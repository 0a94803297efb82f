"""The pages that the code cites: they are there, their code runs, their numbers are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modelctl.core.matching.optimizer_states import TABLE
from modelctl.formats.registry import built_in
from modelctl.pickles import interpreter, machine, opcodes

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_CITED = re.compile(r"docs/([\w-]+\.md)(?:#([\w-]+))?")
_LINKED = re.compile(r"\]\(([\w./-]+?)(?:#([\w-]+))?\)")
# Written down elsewhere than in this repository.
_ELSEWHERE = re.compile(
    r"\b(?:FORMATS|SAFETY|OPTIMIZER|CLI)(?:\.md|:| section| \d| \()|shared/[A-Z]"
)


def texts() -> list[Path]:
    folders = (ROOT / name for name in ("src", "tests", "docs", "examples", "benchmarks"))
    found = [path for folder in folders for path in folder.rglob("*")]
    return [path for path in [*found, *ROOT.glob("*.md")] if path.suffix in (".py", ".md")]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as they are made for Markdown on the web."""
    plain = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", plain, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(text: str, folder: Path) -> list[str]:
    """The citations and links in a text that lead nowhere."""
    targets = [(DOCS / page, anchor) for page, anchor in _CITED.findall(text)]
    targets += [(folder / page, anchor) for page, anchor in _LINKED.findall(text)]
    return [
        f"{path.name}#{anchor}"
        for path, anchor in targets
        if not path.exists() or (anchor and anchor not in anchors(path.read_text("utf-8")))
    ]


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_cited_is_here(path: Path) -> None:
    text = path.read_text("utf-8")
    links = text if path.suffix == ".md" else re.sub(_LINKED, "", text)
    if path != Path(__file__):
        assert broken(links, path.parent) == []
        assert _ELSEWHERE.findall(text) == []


def test_the_pages_are_cited() -> None:
    cited = {
        page
        for path in (ROOT / "src").rglob("*.py")
        for page, _ in _CITED.findall(path.read_text("utf-8"))
    }
    assert {"formats.md", "safety.md", "optimizers.md", "records.md", "cli.md"} <= cited


@pytest.mark.parametrize(
    "text",
    [
        "see docs/no-such-page.md",
        "docs/safety.md#no-such-heading",
        "[x](no-such-file.md)",
        "[x](safety.md#no-such-heading)",
    ],
)
def test_a_broken_citation_is_seen(text: str) -> None:
    assert broken(text, DOCS)


def test_a_citation_of_what_is_not_here_is_seen() -> None:
    for text in ("FORMATS section 1", 'SAFETY: "Zip reader"', "shared/OPTIMIZER.md", "FORMATS 4"):
        assert _ELSEWHERE.search(text)


@pytest.mark.parametrize("page", ["formats.md", "optimizers.md"])
def test_their_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    text = (DOCS / page).read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) > 1
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def table(page: str, head: str) -> dict[str, str]:
    """The first two columns of the table that begins with this line."""
    _, _, rows = (DOCS / page).read_text("utf-8").partition(f"{head}\n")
    cells = [line.split(" | ") for line in rows.partition("\n\n")[0].splitlines()[1:]]
    return {row[0].strip("| "): row[1].strip("| ") for row in cells}


def test_the_limits_are_those_of_the_code() -> None:
    from modelctl.core import tree
    from modelctl.storage.containers import zipdir

    written = table("safety.md", "| of | most |")
    limits = {
        "bytes of a pickle": f"{interpreter.MAX_SIZE >> 20} MiB, or those of its file",
        "opcodes": (
            f"{interpreter.MAX_OPCODES:,}, or one for each byte in the file; "
            f"{interpreter.OPCODES:,} and one for each byte that is deflated there"
        ),
        "lists, dicts (ordered ones, too) and objects": (
            f"{machine.CONTAINERS:,} and one for each {machine.BYTES_A_CONTAINER} bytes; of a "
            f"compressed pickle {machine.MAX_CONTAINERS:,}"
        ),
        "tuples": (
            f"{machine.TUPLES:,} and one for each {machine.BYTES_A_TUPLE} bytes; of a "
            f"compressed pickle {machine.MAX_TUPLES:,}"
        ),
        "compressed structure, inflated": (
            f"{zipdir.MOST_RATIO} times its bytes, or {zipdir.LITTLE >> 10} KiB"
        ),
        "memo slots": (
            f"{machine.MAX_MEMO:,}, or one for each {machine.BYTES_A_SLOT} bytes in the file"
        ),
        "memo slots that are out of order": f"{machine.MAX_MEMO_ANYHOW:,}",
        "open marks": f"{machine.MAX_MARKS:,}",
        "levels of nesting": f"{interpreter.MAX_DEPTH:,}",
        "digits of an integer in text, bytes of a long one": f"{opcodes._MAX_DIGITS:,}",
        "a line of text": f"{machine._MAX_LINE >> 10} KiB",
        "paths in the tree": f"{tree.PATHS_ANYHOW:,}, and {tree.PATHS_EACH} for each thing in it",
    }
    assert {of: most for of, most in written.items() if of in limits} == limits


def test_the_findings_are_those_of_the_code() -> None:
    text = (DOCS / "safety.md").read_text("utf-8")
    rows = re.findall(r"^\| (dangerous|suspicious) \| (.*?) \|", text, re.M)
    written = {(level, id) for level, ids in rows for id in re.findall(r"`([\w-]+)`", ids)}
    source = "".join(path.read_text() for path in (ROOT / "src/modelctl/pickles").glob("*.py"))
    made = set(re.findall(r'Finding\(\s*"(\w+)", "([\w-]+)"', source))
    made |= {("dangerous", id) for id in re.findall(r'\.danger\(\s*"([\w-]+)"', source)}
    walk = (ROOT / "src/modelctl/scanning/walk.py").read_text()
    made |= {("suspicious", id) for id in re.findall(r'\.odd\(\w+, "([\w-]+)"', walk)}
    assert written == made


def test_what_verify_finds_is_what_the_code_knows() -> None:
    from typing import get_args

    from modelctl.integrity.sections import Kind

    names = ", ".join(table("safety.md", "| finding | meaning |"))
    assert set(re.findall(r"`(\w+)`", names)) == {*get_args(Kind)}


def test_what_optimizers_keep_is_what_the_code_knows() -> None:
    rows = table("optimizers.md", "| optimizer | state of a parameter |")
    for names, keys in rows.items():
        known = [one for one in TABLE if one.name in names.split(", ")]
        assert known, names
        kept = {key for one in known for key in (*one.shaped, *one.scalars, *one.others)}
        assert set(re.findall(r"`(\w+)`", keys)) <= kept, names


SECTIONS = {
    "torch": "torch-zip",
    "torch-legacy": "legacy",
    "torch-tar": "tar",
    "torchscript": "compiled-programs",
    "torch-export": "compiled-programs",
    "safetensors": "safetensors",
    "sharded": "shards",
    "folder": "folders",
    "pipeline": "folders",
    "dcp": "dcp",
    "dcp-safetensors": "dcp",
    "ranks": "rank-files",
    "zero": "zero",
    "zero-universal": "zero",
    "archive": "archives",
    "tar-gz": "archives",
    "tar": "archives",
    "pickle": "archives",
}


def test_every_format_has_its_section() -> None:
    assert {known.name for known in built_in()} == set(SECTIONS)
    assert set(SECTIONS.values()) <= anchors((DOCS / "formats.md").read_text("utf-8"))
