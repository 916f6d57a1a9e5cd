"""The sandbox that templates run in: jinja2 as transformers sets it up, with text that keeps its provenance.

jinja2 makes text in five places: what is printed and collected (`Environment.concat`), `~` (compiled code), `%` (an
operator that the sandbox hands over), methods of strings (looked up by the sandbox) and filters. Here all five go by
provenance.py. Filters are in three groups: those written for provenance, those that hand on values as they are, and
the rest, whose text is wholly the user's where an argument may be.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from worker_orcd.chat import provenance
from worker_orcd.chat.content import Null, WantsParts, as_json
from worker_orcd.chat.provenance import Text, as_text, tracked, whole

#: filters that give back items, numbers or slices of what they are given, or call other filters
_HANDED_ON = frozenset(
    ("abs", "attr", "batch", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last",
     "length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "round", "select",
     "selectattr", "slice", "sort", "sum", "truncate", "unique", "wordcount")
)  # fmt: skip


def raise_exception(message: object) -> None:
    """What templates call to refuse messages, such as roles in the wrong order."""
    raise jinja2.TemplateError(str(message))


def strftime_now(form: str) -> str:
    """Local time; some templates tell the model the date."""
    return whole(datetime.datetime.now().strftime(form), form)


def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None,
           separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """JSON as it is, where jinja2's own filter would escape it for HTML."""
    text = as_json(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return whole(text, value, separators, indent)


def _replace(s: object, old: object, new: object, count: int | None = None) -> str:
    return tracked(as_text(s)).replace(as_text(old), as_text(new), -1 if count is None else count)


@pass_environment
def _join(env: jinja2.Environment, value: Any, d: object = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(env, attribute), value)
    return tracked(as_text(d)).join(map(as_text, value))


def _trim(value: object, chars: str | None = None) -> str:
    return as_text(value).strip(chars)


def _indent(s: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    by = width if isinstance(width, str) else " " * width
    lines = (tracked(as_text(s)) + "\n").splitlines()
    rest = [by + line if line or blank else line for line in lines[1:]]
    return provenance.concat([by if first else "", Text("\n", provenance.TEMPLATE).join([lines[0], *rest])])


def _format(value: object, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("format takes values in order or by name, not both")
    return provenance.percent(as_text(value), kwargs or args)


def _of_strings(name: str) -> Callable[[object], str]:
    """A filter that is a method of strings."""

    def call(value: object) -> str:
        text: str = getattr(tracked(as_text(value)), name)()
        return text

    return call


def _unknown(call: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2 that tells nothing of where the characters of its text are from."""
    n_own = 1 if hasattr(call, "jinja_pass_arg") else 0

    @functools.wraps(call)
    def wrapper(*args: Any, **named: Any) -> Any:
        result = call(*args, **named)
        return whole(result, args[n_own:], *named.values()) if isinstance(result, str) else result

    return wrapper


def _filters(known: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    out = {name: call if name in _HANDED_ON else _unknown(call) for name, call in known.items()}
    out |= {name: _of_strings(name) for name in ("lower", "upper", "capitalize")}
    out |= {"format": _format, "indent": _indent, "join": _join, "replace": _replace, "safe": as_text,
            "string": as_text, "tojson": tojson, "trim": _trim}  # fmt: skip
    return out


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: what an assistant said, which transformers marks for training. Renders its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """The body, called as a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateNamespace(Namespace):
    """`namespace`, without attributes that Python itself would look for."""

    def __init__(*args: Any, **named: Any) -> None:
        self, *values = args
        attributes = dict(*values, **named)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the attribute {name!r} of a namespace begins with an underscore")


class _Compiler(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_EvalContextModifier(self, node: nodes.EvalContextModifier, frame: Frame) -> None:
        self.fail("autoescape is for HTML, not for chat templates", node.lineno)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with what chat templates are written for: block trimming, loop controls and helpers."""

    code_generator_class = _Compiler
    concat = staticmethod(provenance.concat)
    intercepted_binops = frozenset("%")

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols],
                         finalize=as_text)  # fmt: skip
        self.filters = _filters(self.filters)
        self.tests["none"] = lambda value: value is None or isinstance(value, Null)
        self.globals.pop("lipsum", None)
        self.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, namespace=TemplateNamespace)
        self.finds_parts = False

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox does, with methods of strings that keep provenance."""
        return super().getattr(self._seen(obj, attribute), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As the sandbox does, with methods of strings that keep provenance."""
        return super().getitem(self._seen(obj, argument), argument)

    def _seen(self, obj: Any, attribute: object) -> Any:
        if type(obj) is Text and attribute == "type" and len(obj) == 1 and self.finds_parts:
            raise WantsParts
        return tracked(obj) if type(obj) is str and isinstance(attribute, str) else obj

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` and `format_map` of strings, within the sandbox."""
        if super().wrap_str_format(value) is None:
            return None
        form, takes_map = value.__self__, value.__name__ == "format_map"

        def call(*values: Any, **named: Any) -> str:
            if takes_map:
                (named,), values = values, ()
            return provenance.braces(SandboxedFormatter(self), form, values, named)

        return call

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`%`, of strings with provenance."""
        return provenance.percent(left, right) if isinstance(left, str) else left % right

    def call(__self, __context: Context, __obj: Any, *args: Any, **named: Any) -> Any:
        """Call something; text out of bytes, numbers and strings without provenance is the user's."""
        result = super().call(__context, __obj, *args, **named)
        if isinstance(result, str) and type(result) is not Text:
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str | bytes | int | float | complex) and type(owner) is not Text:
                return Text(result)
        return result


def compiled(source: str) -> tuple[ChatEnvironment, jinja2.Template]:
    """A template and its own environment."""
    environment = ChatEnvironment()
    return environment, environment.from_string(source)
