"""Options that commands share, and the rule that every flag is also an environment variable."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from worker_orcd import config
from worker_orcd.errors import InvalidRequest
from worker_orcd.runtime.streams import is_terminal

if TYPE_CHECKING:
    from worker_orcd.cuda.vram import VramPlan

ENV_PREFIX = "WORKER_ORCD_"


#: {field of ServeConfig: its default}; a field that must be given is not in it
_DEFAULTS: dict[str, Any] = {
    f.name: f.default
    for f in dataclasses.fields(config.ServeConfig)
    if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
}


class FilePath(click.ParamType):  # type: ignore[type-arg]  # older releases of click have no argument there
    """A path; a leading ~ is the user's home. Shells leave it alone in `--model=~/m.gguf` and files of variables."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path as text. Called by click."""
        try:
            return config.file_path("the path", value)
        except InvalidRequest as error:
            self.fail(error.message, param, ctx)


class OutFile(FilePath):
    """A file to be written when the work is done: that it can be is looked at before."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path as text. Called by click."""
        path = super().convert(value, param, ctx)
        if os.path.isdir(path):
            self.fail(f"{path} is a folder", param, ctx)
        if not os.path.isdir(os.path.dirname(path) or "."):
            self.fail(f"{path}: there is no such folder", param, ctx)
        return path


class Numbers(click.ParamType):  # type: ignore[type-arg]  # as above
    """Whole numbers with commas between them.

    Args:
        or_none: an empty text is no number.
    """

    name = "numbers"

    def __init__(self, or_none: bool = False) -> None:
        self._or_none = or_none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The numbers. Called by click, also with what it has converted."""
        if isinstance(value, list):
            return value
        if self._or_none and not value.strip():
            return []
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            self.fail("must be whole numbers with commas between them, for example 1,2,3", param, ctx)


class _Option(click.Option):
    """An option whose empty variable counts as absent, but for one that guards something.

    Args:
        guard: refuse a variable that is set but empty: whoever set it meant to be protected.
    """

    def __init__(self, *args: Any, guard: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._guard = guard

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value of the first variable that has one. Called by click."""
        names = [self.envvar] if isinstance(self.envvar, str) else self.envvar or ()
        for name in names:
            if self._guard and os.environ.get(name, "x").strip() == "":
                raise InvalidRequest(
                    f"the environment variable {name} is empty; give a value or unset it", field=self.name
                )
        return super().resolve_envvar_value(ctx)


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """`click.option` with the variable WORKER_ORCD_<FLAG> for each of its names and the default shown in the help.

    What the help shows as FILE or DIR is a path.
    """
    if settings.get("metavar", "").startswith(("FILE", "DIR")) and not isinstance(settings.get("type"), FilePath):
        settings["type"] = FilePath()
    flags = [n.split("/")[0] for n in names if n.startswith("--")]
    variables = [ENV_PREFIX + flag[2:].replace("-", "_").upper() for flag in flags]
    settings.setdefault("envvar", variables if len(variables) > 1 else variables[0])
    settings.setdefault("show_envvar", True)
    settings.setdefault("cls", _Option)
    if settings.get("default") is not None and not settings.get("is_flag"):
        settings.setdefault("show_default", True)
    return click.option(*names, **settings)


def config_option(name: str) -> Callable[[Any], Any]:
    """The option for the field `name` of `ServeConfig`, as its `Flag` says.

    The command's parameter has the field's name, and its value the field's unit.
    """
    flag, default = config.FLAGS[name], _DEFAULTS.get(name)
    names = [f"--{n}" for n in (flag.name or name.replace("_", "-"), *flag.aliases)]
    settings: dict[str, Any] = {"help": flag.help, "required": name not in _DEFAULTS}
    if flag.kind is bool:
        if default:
            names = [f"{n}/--no-{n[2:]}" for n in names]
            settings["default"] = True
        else:
            settings["is_flag"] = True
        return option(*names, name, **settings)
    if not flag.chosen and name in _DEFAULTS:  # with a default, be it None, click demands nothing
        settings["default"] = default
    settings["type"] = click.Choice(flag.choices) if flag.choices else _number_type(flag)
    if flag.guard:
        settings["guard"] = True
    if flag.many:
        settings["multiple"] = True
    if flag.metavar:
        settings["metavar"] = flag.metavar
    if flag.unit != 1:
        settings["callback"] = lambda context, parameter, value: None if value is None else value * flag.unit
    return option(*names, name, **settings)


def _number_type(flag: config.Flag) -> Any:
    if flag.kind is str or flag.usage == "none":
        return flag.kind
    least, most = flag.least, flag.most if flag.usage == "both" else None
    if flag.kind is float:
        return click.FloatRange(least, most)
    # a flag in MiB begins with one
    return click.IntRange(int(least or 0) if flag.unit == 1 else 1, None if most is None else int(most))


def config_options(*names: str) -> Callable[[Any], Any]:
    """The options of several fields, in this order in the help."""

    def decorate(command: Any) -> Any:
        for name in reversed(names):
            command = config_option(name)(command)
        return command

    return decorate


model_option = config_option("model")
device_option = config_option("device")
threads_option = config_option("n_threads")
vram_options = config_options("vram_limit_bytes", "gpu_memory_utilization")
trusted_option = config_option("trusted_models")
#: how a model is loaded, and what is demanded of its file
load_options = config_options(
    "context_length",
    "kv_cache_bytes",
    "vram_limit_bytes",
    "gpu_memory_utilization",
    "tokenizer",
    "check_tensors",
    "expect_sha256",
    "trusted_models",
)


def json_option(command: Any) -> Any:
    """--json."""
    return option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


def verbose_option(command: Any) -> Any:
    """--verbose."""
    return option(
        "-v",
        "--verbose",
        is_flag=True,
        help="Say what the model takes on the GPU before it is loaded; on a terminal always.",
    )(command)


def plan_printer(verbose: bool) -> Callable[[VramPlan, int], None] | None:
    """What prints a VRAM plan on stderr for whoever looks; None where nobody does."""
    if not (verbose or is_terminal(sys.stderr)):
        return None
    return lambda plan, free: click.echo(plan.table(free), err=True)
