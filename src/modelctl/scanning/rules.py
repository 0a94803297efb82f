"""What findings are called, and what each means: one list, for the reports and for the docs."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Rule(NamedTuple):
    """A kind of finding.

    Attributes:
        id: what it is called, which stays.
        level: how bad it is.
        short: what it means, in a line.
    """

    id: str
    level: Literal["dangerous", "malformed", "unscanned", "suspicious"]
    short: str


RULES = (
    Rule("call", "dangerous", "calls a function that is on no list of harmless ones"),
    Rule("name", "dangerous", "names what may run code, whoever calls it"),
    Rule("dotted-name", "dangerous", "names an attribute of something (os:path.system)"),
    Rule("dotted-call", "dangerous", "calls an attribute of something"),
    Rule("computed-call", "dangerous", "calls a value that it computed"),
    Rule("computed-name", "dangerous", "names what it computed"),
    Rule("dunder-state", "dangerous", "plants an attribute like __class__ in an object"),
    Rule("array-dtype", "dangerous", "has numpy take bytes for addresses, or read elsewhere"),
    Rule("build-on-global", "dangerous", "changes a class or function itself"),
    Rule("setitem-on-global", "dangerous", "changes the items of a class or function"),
    Rule("extension", "dangerous", "names an entry of the reader's extension registry"),
    Rule("persistent-id", "dangerous", "hands a reader what is no storage to load"),
    Rule("custom-class", "suspicious", "builds an object of somebody's own class"),
    Rule("custom-name", "suspicious", "names, and so imports, somebody's own module"),
    Rule("trailing-bytes", "suspicious", "bytes follow where a pickle ended"),
    Rule("odd-zip", "suspicious", "a zip with what no writer of checkpoints writes"),
    Rule("odd-file", "suspicious", "holds what no writer of checkpoints writes"),
    Rule("malformed", "malformed", "contradicts itself: readers would understand it differently"),
    Rule("unscanned", "unscanned", "could not be looked at, or not to its end"),
)
