"""A cell as the magic runs it: compiled with what IPython knows of it, in the user's namespace, `await` allowed.

The one idea: IPython already runs a cell with a top-level `await` in the kernel's own event loop. So a measured cell that
awaits is rewritten, before IPython looks at it, into one `await` of the magic; there is no second loop and no second thread.
Every other cell keeps the ordinary way of a magic.

Not covered: what is done around the cell (`magics`).
"""

from __future__ import annotations
import __future__

import ast
import asyncio
import contextlib
import inspect
import io
import re
import threading
import tokenize
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from .options import MeasureUsageError, split_statement

# What a line that IPython did not take for the first one of a cell is called: it has become a line magic of this name.
MISPLACED = "%measure_energy"
# The kernel's loop looks for an interrupt only when it wakes up, and hands it on in two rounds.
TICK_S = 0.1
ROUNDS = 3
_CELL = re.compile(r"%%measure_energy(?=\s|$)")
_LINE = re.compile(r"%measure_energy(?=\s|$)")
_ENTRY = "get_ipython().magics_manager.registry['MeasureMagics']"


@dataclass(frozen=True)
class Cell:
    """A compiled cell. `run` it, or `run_awaiting` where it `waits`; both give the value of its last expression."""

    body: CodeType
    tail: CodeType | None  # the last expression
    silent: bool  # the source ends with ";"
    names: tuple[dict[str, Any], dict[str, Any]]  # globals and locals
    hides: bool | str  # which frames of a traceback IPython is to leave out

    @property
    def waits(self) -> bool:
        return _awaits(self.body) or (self.tail is not None and _awaits(self.tail))

    def run(self) -> Any:
        __tracebackhide__ = self.hides
        exec(self.body, *self.names)
        value = eval(self.tail, *self.names) if self.tail else None
        return None if self.silent else value

    async def run_awaiting(self) -> Any:
        __tracebackhide__ = self.hides
        value = None
        for code in (self.body, self.tail):
            if code is not None:
                value = eval(code, *self.names)
                if _awaits(code):
                    value = await value
        for _ in range(ROUNDS if _loop() is not None else 0):
            await asyncio.sleep(0)  # an interrupt while the code held the loop up comes through here, and belongs to it
        return value if self.tail and not self.silent else None


def compiled(shell: Any, line: str, text: str, statement: bool = False, names: dict[str, Any] | None = None) -> Cell:
    """`text` compiled, which stood below `%%measure_energy line`, or as a `statement` behind `%measure_energy`.

    The source is cached under a name of its own, magic line included, so that tracebacks show the user's lines with the
    numbers they have in the cell. `names` are the locals of whoever asks. SyntaxError as the user would get it without the
    magic; MeasureUsageError for a second `%%measure_energy` inside.
    """
    again = _CELL.match(text.lstrip()) is not None  # IPython would take it for a cell of its own
    blank = len(text) - len(text.lstrip("\n"))  # IPython drops blank lines at the start; they count for line numbers
    source = "\n" * blank + shell.transform_cell(text)
    number, above = _place(shell, text)
    if statement:
        name = shell.compile.cache(source, len(shell.history_manager.input_hist_raw) - 1, raw_code=text)
        try:
            tree = shell.compile.ast_parse(source, filename=name)
        except SyntaxError as error:
            raise MeasureUsageError(f"{text!r} is not Python: {error.msg}") from None
    else:
        name = shell.compile.cache("\n" * (above - 1) + f"%%measure_energy {line}\n{source}", number, raw_code=text)
        tree = shell.compile.ast_parse("\n" * above + source, filename=name)
    if again or any(_is_magic(node, MISPLACED) for node in ast.walk(tree)):
        raise MeasureUsageError(
            "a second %%measure_energy inside the cell: a cell is measured once. Measure a part of it with "
            "`%measure_energy statement`, or in the block of `with lem_kit.jupyter.session().window('part'):`"
        )
    tree = shell.transform_ast(tree)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = _compile(shell, tree, name, "exec")
    tail = _compile(shell, ast.Expression(last.value), name, "eval") if last else None
    # Whoever calls a magic of a line is on the way to the error; above a cell there is only IPython.
    hides = True if statement else "__ipython_bottom__"
    return Cell(body, tail, _ends_silently(source), (shell.user_global_ns, names or shell.user_ns), hides)


def _compile(shell: Any, tree: ast.AST, name: str, mode: str) -> CodeType:
    flags = shell.compile.flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code: CodeType = compile(tree, name, mode, flags, dont_inherit=True)  # type: ignore[call-overload]
    for feature in __future__.all_feature_names:  # what a cell imports from __future__ holds in those after it
        shell.compile.flags |= code.co_flags & getattr(__future__, feature).compiler_flag
    return code


def _place(shell: Any, text: str) -> tuple[int, int]:
    """The number of the cell that runs, and how many of its lines stand above `text`."""
    history = shell.history_manager.input_hist_raw
    raw, body = history[-1].rstrip(), text.rstrip()
    if not raw.endswith(body):
        return shell.execution_count, 1
    return len(history) - 1, max(raw[: len(raw) - len(body)].count("\n"), 1)


def _awaits(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_COROUTINE)


def _is_magic(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "run_line_magic"
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == name
    )


def _ends_silently(source: str) -> bool:
    """Whether the last token is a semicolon, which keeps a value from being shown."""
    passed = (tokenize.ENDMARKER, tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.DEDENT)
    try:
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in passed]
    except (tokenize.TokenError, SyntaxError):
        return False
    return bool(tokens) and tokens[-1].string == ";"


# --- cells that await -------------------------------------------------------------------------------------------------


def rewriter(shell: Any, parser: ArgumentParser, is_running: Callable[[], bool]) -> Callable[[list[str]], list[str]]:
    """An input transformer for `shell` that rewrites measured cells that await, and those that IPython would say too little
    or too much about. `parser` is that of the magic's options; `is_running` tells whether a cell runs already."""

    def lem_kit_cells(lines: list[str]) -> list[str]:
        split = _split(parser, lines)
        if split is None:
            return lines
        line, text, statement = split
        if not text:
            return [f"{_ENTRY}.refuse_empty()\n"]
        try:
            awaits = _text_awaits(shell, text)
        except (SyntaxError, ValueError):  # said of the cell as if it had no magic: without the calls in between
            return lines if statement else [f"# {lines[0]}", *lines[1:]]
        if not awaits or not shell.autoawait:
            return lines
        if is_running() and threading.current_thread() is threading.main_thread() and _loop() is not None:
            return [f"{_ENTRY}.refuse_await()\n"]
        arguments = f"{line!r}, {text!r}, statement=True" if statement else f"{line!r}, {text!r}"
        return [f"await {_ENTRY}.measure_awaiting({arguments})\n"]

    lem_kit_cells.has_side_effects = True  # type: ignore[attr-defined]  # so that a console takes the cell for what it is
    return lem_kit_cells


def _split(parser: ArgumentParser, lines: list[str]) -> tuple[str, str, bool] | None:
    """Options, source, and whether that is a statement, of a measured cell or of a cell that is one measured line."""
    if not lines:
        return None
    if head := _CELL.match(lines[0]):
        return lines[0][head.end() :].strip(), "".join(lines[1:]), False
    head = _LINE.match(lines[0])
    if head and not any(line.strip() for line in lines[1:]):
        try:
            options, text = split_statement(parser, lines[0][head.end() :].strip())
        except MeasureUsageError:  # said by the magic itself
            return None
        return options, text, True
    return None


def _text_awaits(shell: Any, text: str) -> bool:
    flags = shell.compile.flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    return _awaits(compile(shell.transform_cell(text), "cell", "exec", flags, dont_inherit=True))


def _loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@contextlib.contextmanager
def prompt_interrupts() -> Iterator[None]:
    """While entered, the event loop wakes up often enough for an interrupt of a cell that awaits to be prompt."""

    async def tick() -> None:
        while True:
            await asyncio.sleep(TICK_S)

    loop = _loop()  # None where nothing awaits, or in a loop that is not asyncio's
    ticking = loop.create_task(tick()) if loop else None
    try:
        yield
    finally:
        if ticking is not None:
            ticking.cancel()
