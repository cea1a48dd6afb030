"""YAML as a tree of nodes that know their lines, and what is said when one of them is wrong.

The text is never read as Python objects: each complaint names file, line, key, what was expected, what was found and
what to do. Every key is known or refused: a misspelt guardrail must not be one that silently does not exist. The forms
are those of a Kubernetes object (`apiVersion`, `kind`, `metadata`, `spec`); `cohorts` and `round_yaml` read them.
"""

from __future__ import annotations

import re
from collections.abc import Set

import yaml

from model_delta.errors import Malformed
from model_delta.topics import NAME, NAME_TOLD

API_VERSION = "atoll/v1"
YAML_BYTES_MAX = 65_536


def read_object(text: str, file: str, kind: str, example: str) -> tuple[str, Place]:
    """Name and `spec` of an object of this kind. Raises Malformed with one line; `example` is a file that shows one."""
    if len(text.encode(errors="replace")) > YAML_BYTES_MAX:
        raise Malformed(f"{file}: expected at most {YAML_BYTES_MAX} bytes of YAML, found {len(text)} characters")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Malformed(f"{file}:{line}: expected YAML, found {error.problem}; check the indentation") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise Malformed(f"{file}:1: expected YAML, found {type(error).__name__}; check the file's encoding") from None
    if root is None:
        raise Malformed(f"{file}:1: expected a {kind.lower()}, found an empty file; start from {example}")
    top = Place(file, "", root).map({"apiVersion", "kind", "metadata", "spec"})
    top["apiVersion"].one_of((API_VERSION,))
    top["kind"].one_of((kind,))
    return top["metadata"].map({"name"})["name"].text("a name", NAME_TOLD, NAME), top["spec"]


class Place:
    """A node of the YAML tree together with the path that leads to it."""

    def __init__(self, file: str, path: str, node: yaml.Node) -> None:
        self.file, self.path, self.node = file, path, node

    def wrong(self, expected: str, advice: str, found: str | None = None) -> Malformed:
        """The complaint about this node."""
        where = f"{self.file}:{self.node.start_mark.line + 1}: {self.path or 'document'}"
        return Malformed(f"{where}: expected {expected}, found {found or self._found()}; {advice}")

    def refused(self, text: str) -> Malformed:
        """A complaint in its own words: expected, found and what to do."""
        return Malformed(f"{self.file}:{self.node.start_mark.line + 1}: {self.path or 'document'}: {text}")

    def map(self, required: Set[str], optional: Set[str] = frozenset()) -> dict[str, Place]:
        """The children of a mapping with exactly these keys."""
        known = required | optional
        listed = ", ".join(sorted(known))
        children = self.free_map(f"a mapping with {listed}")
        for key, child in children.items():
            if key not in known:
                raise child.wrong(f"one of {listed}", "correct or remove the key", f"the key {key!r}")
        for key in sorted(required - children.keys()):
            raise self.wrong(f"the key {key!r}", f"add `{key}:`", f"only {', '.join(sorted(children)) or 'nothing'}")
        return children

    def free_map(self, expected: str) -> dict[str, Place]:
        """The children of a mapping with any keys; a key may stand there once."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong(expected, "indent `key: value` lines below it")
        children: dict[str, Place] = {}
        for key_node, value_node in self.node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            child = Place(self.file, f"{self.path}.{key}".lstrip("."), value_node)
            if key in children:
                raise child.wrong(f"{key!r} once", "remove one of them", "it twice")
            children[key] = child
        return children

    def items(self, most: int) -> list[Place]:
        """The children of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong("a list", "start each item with `- `")
        if len(self.node.value) > most:
            raise self.wrong(f"at most {most} items", "shorten the list", str(len(self.node.value)))
        return [Place(self.file, f"{self.path}[{index}]", node) for index, node in enumerate(self.node.value)]

    def text(self, expected: str, form: str = "", pattern: re.Pattern[str] | None = None) -> str:
        """A scalar as text."""
        if not isinstance(self.node, yaml.ScalarNode) or not self.node.value:
            raise self.wrong(expected, "write it after the colon")
        if pattern is not None and not pattern.fullmatch(self.node.value):
            raise self.wrong(f"{expected} of {form}", "rename it")
        return str(self.node.value)

    def one_of(self, values: tuple[str, ...]) -> str:
        """A scalar with one of a few values."""
        if not isinstance(self.node, yaml.ScalarNode) or self.node.value not in values:
            raise self.wrong(" or ".join(values), "use one of these")
        return str(self.node.value)

    def yes_or_no(self) -> bool:
        """true or false."""
        return self.one_of(("true", "false")) == "true"

    def number(self, expected: str, low: float, high: float, whole: bool = False) -> float:
        """A number in [low, high]."""
        try:
            value = float(self.text(expected))
        except ValueError:
            raise self.wrong(expected, f"write a number from {low:g} to {high:g}") from None
        if not low <= value <= high or (whole and value != int(value)):
            raise self.wrong(expected, f"write a {'whole ' if whole else ''}number from {low:g} to {high:g}")
        return value

    def share(self) -> float:
        """A percentage (`25%`) as a fraction."""
        text = self.text("a percentage such as 25%")
        try:
            value = float(text.removesuffix("%")) / 100
        except ValueError:
            value = -1.0
        if not text.endswith("%") or not 0 <= value <= 1:
            raise self.wrong("a percentage from 0% to 100%", "write it like 25%")
        return value

    def _found(self) -> str:
        if isinstance(self.node, yaml.ScalarNode):
            return repr(self.node.value[:60]) if self.node.value else "nothing"
        return "a list" if isinstance(self.node, yaml.SequenceNode) else "a mapping"
