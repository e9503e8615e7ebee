"""Parser of prompt templates, in the syntax of the library dynamicprompts as far as listed here.

    {a|b}  {0.7::a|2::b}                one alternative; with weights
    {2$$a|b|c}  {1-2$$ and $$a|b|c}     several, joined by "," or " and "
    __name__  __dir/*__                 a line of name.txt; of every file that matches
    {2$$__name__}                       several lines of a file
    ${c=red}  ${c=!{red|blue}}          a variable; one that is drawn once
    ${c}  ${c:red}                      its use; with a default
    \\{ \\| \\} \\__name__ \\${            plain text

Anything else that looks like the syntax is refused. Parsing takes linear time, without recursion.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from sampler.core.errors import UsageError
from sampler.runs.templates import Assignment, Choice, Concat, Node, Selection, Text, Use

MAX_DEPTH = 20  # of nested variants
MAX_TREE = 200
MAX_PARTS = 10_000
MAX_PICKS = 1_000_000  # options times picks of one variant
SEPARATOR = ","
_TOKEN = re.compile(
    r"\\__\S(?:[^{}|]{0,200}?\S)?__|\\[{|}]|\\[$%](?=\\?\{)|__\S(?:[^{}|]{0,200}?\S)?__|"
    r"\$\{[^{}|:=!?]*(?:\}|:|\?=|=!|=)?|%\{|"
    r"\{(?:\s*[!~@]?\d*-?\d*\$\$(?:[^${}]*\$\$)?)?|[|}]"
)
_BOUNDS = re.compile(r"\{\s*(\d{0,6})(-?)(\d{0,6})\$\$(?:([^${}]*)\$\$)?$")
_VARIABLE = re.compile(r"\$\{\s*([A-Za-z_-][\w-]*)\s*(\}|:|=!|=)$")
_WEIGHT = re.compile(r"\s*(-?(?:\d+\.?\d*|\.\d+))::")
_LOOKS_LIKE = re.compile(r"\{[^{}|$]*(?:\||\$\$)|__[A-Za-z0-9_\-/*]+__|\$\{\w+")

Option = tuple[float, Node]


def looks_like_template(text: str) -> bool:
    """Check for template syntax in a prompt that is not expanded."""
    return ("{" in text or "__" in text) and _LOOKS_LIKE.search(text) is not None


@dataclass
class _Open:
    """A variant, variable or template whose end is not reached; `token` opened it."""

    token: str = ""
    options: list[Option] = field(default_factory=list[Option])
    parts: list[Node] = field(default_factory=list[Node])
    weight: float = 1.0


class TemplateParser:
    """Parser of one template, or of the lines of one wildcard file.

    shown: the prompt that errors name; wildcard: choice of the lines of a name.
    """

    def __init__(self, shown: str, wildcard: Callable[[str], Choice]) -> None:
        self._shown, self._wildcard = shown, wildcard
        self._variables: dict[str, Node] = {}
        self._stack: list[_Open] = []

    def option(self, line: str) -> Option:
        """Parse a line of a wildcard file, which may begin with its weight."""
        weight, rest = self._weight(line)
        return weight, self.parse(rest)

    def parse(self, text: str) -> Node:
        """Parse a template. Raises UsageError."""
        self._stack, self._variables, position = [_Open()], {}, 0
        for number, token in enumerate(_TOKEN.finditer(text)):
            if number > MAX_PARTS:
                raise self._refused(f"more than {MAX_PARTS} variants")
            self._literal(text[position : token.start()])
            position = token.end()
            self._take(token[0])
        if len(self._stack) > 1:
            raise self._refused(r"a { is never closed (\{ is a plain one)")
        self._literal(text[position:])
        return self._concat(self._stack[0].parts)

    def _take(self, token: str) -> None:
        top = self._stack[-1]
        if token.startswith("\\"):
            top.parts.append(Text(token[1:]))
        elif token.startswith("__"):
            top.parts.append(self._wildcard(token[2:-2]))
        elif token.startswith("${"):
            self._variable(token)
        elif token == "%{":
            raise self._refused(r"%{...} is not supported (\%{ is plain text)")
        elif token.startswith("{"):
            if len(self._stack) > MAX_DEPTH:
                raise self._refused(f"variants are nested more than {MAX_DEPTH} deep")
            self._stack.append(_Open(token))
        elif token == "}" and not top.token:
            raise self._refused(r"a } without a { before it (\} is a plain one)")
        elif token == "}":
            self._close()
        elif top.token.startswith("{"):
            self._end_option(top)
        else:
            top.parts.append(Text(token))

    def _literal(self, text: str) -> None:
        """Add plain text; at the start of an alternative it may hold a weight."""
        top = self._stack[-1]
        if top.token.startswith("{") and not top.parts:
            if not top.options and top.token == "{" and text.lstrip()[:1] in ("!", "~", "@"):
                raise self._refused(f"{{{text.lstrip()[0]} is not supported; use --expand")
            top.weight, text = self._weight(text)
        if top.token.startswith("{") and "$$" in text:
            raise self._refused("$$ is only read after a number, as in {2$$a|b}")
        if text:
            top.parts.append(Text(text))

    def _weight(self, text: str) -> tuple[float, str]:
        found = _WEIGHT.match(text)
        if not found:
            return 1.0, text
        if not 0 <= (weight := float(found[1])) < 1e9:
            raise self._refused(f"the weight {found[1]} must be from 0 to 10^9")
        return weight, text[found.end() :]

    def _end_option(self, top: _Open) -> None:
        top.options.append((top.weight, self._concat(top.parts)))
        top.parts, top.weight = [], 1.0

    def _close(self) -> None:
        top = self._stack.pop()
        if top.token.startswith("$"):
            self._end_variable(top)
            return
        self._end_option(top)
        if top.token == "{":
            self._stack[-1].parts.append(self.choice(top.options))
        else:
            self._stack[-1].parts.append(self._selection(top.token, top.options))

    def choice(self, options: list[Option]) -> Choice:
        """Choice between options; those of weight 0 are left out."""
        options = [option for option in options if option[0] > 0]
        if not options:
            raise self._refused("nothing to choose from has a weight above 0")
        return Choice([node for _, node in options], [weight for weight, _ in options])

    def _selection(self, token: str, options: list[Option]) -> Node:
        found = _BOUNDS.match(token)
        if not found or not (found[1] or found[3]):
            raise self._refused(f"{token:.40} is not understood; write {{2$$a|b}} or {{1-2$$a|b}}")
        options = [option for option in options if option[0] > 0]
        if len(options) == 1 and isinstance(options[0][1], Choice):  # {2$$__name__}
            inner = options[0][1]
            options = list(zip(inner.weights, inner.options, strict=True))
        given = [int(bound) if bound else None for bound in (found[1], found[3])]
        low = given[0] if found[1] else 1
        high = given[1] if found[3] else (len(options) if found[2] else low)
        low, high = sorted((low or 0, high or 0))
        if low > len(options):
            raise self._refused(f"{token:.40} asks for {low} of {len(options)} alternatives")
        high = min(high, len(options))
        if len(options) * high > MAX_PICKS:
            raise self._refused(f"{token:.40} has too many alternatives")
        separator = SEPARATOR if found[4] is None else found[4]
        return Selection([n for _, n in options], [w for w, _ in options], low, high, separator)

    def _variable(self, token: str) -> None:
        found = _VARIABLE.match(token)
        if not found:
            raise self._refused(
                f"{token:.40} is not understood; write ${{c=red}} and ${{c}} (\\${{ is plain text)"
            )
        name, kind = found[1], found[2]
        if kind.startswith("=") and len(self._stack) > 1:
            raise self._refused(f"the variable {name:.40} is set inside of a variant")
        if kind != "}":
            self._stack.append(_Open(token))
        elif name in self._variables:
            self._stack[-1].parts.append(self._variables[name])
        else:
            raise self._refused(f"the variable {name:.40} is used before it is set")

    def _end_variable(self, top: _Open) -> None:
        found = _VARIABLE.match(top.token)
        assert found is not None
        name, value = found[1], self._concat(top.parts)
        if found[2] == "=!":
            assignment = Assignment(name, value)
            self._variables[name] = Use(assignment)
            self._stack[-1].parts.append(assignment)
        elif found[2] == "=":
            self._variables[name] = value
        else:
            self._stack[-1].parts.append(self._variables.get(name, value))

    def _concat(self, parts: list[Node]) -> Node:
        node = parts[0] if len(parts) == 1 else Concat(parts)
        if node.depth > MAX_TREE:
            raise self._refused("wildcards and variables are nested too deeply")
        return node

    def _refused(self, problem: str) -> UsageError:
        return UsageError(f"{self._shown!r:.60}: {problem}.")
