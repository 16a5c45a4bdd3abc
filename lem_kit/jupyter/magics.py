"""`%%measure_energy`: run a cell in a measurement window and show what it cost.

The one idea: the magic compiles the cell itself and runs it in the user's namespace, so that the cell's value, its names and
its exceptions (with the user's own lines) are what they would be without the magic. An exception is recorded and raised
again; nothing is swallowed. Not covered yet: cells with top-level `await`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from IPython.core.display_functions import display
from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from .. import store
from ..measurement import Measurement

try:
    from IPython.core.magic import output_can_be_silenced
except ImportError:  # IPython 7

    def output_can_be_silenced(magic_func: Any) -> Any:
        return magic_func


class MeasureUsageError(ValueError):
    """Wrong options of `%%measure_energy`. Not IPython's UsageError, which leaves no error in a notebook's outputs."""

    def _render_traceback_(self) -> list[str]:
        return [f"MeasureUsageError: {self}", "Type %measure_energy? for the options."]


@magics_class
class MeasureMagics(Magics):
    """Registered by `%load_ext lem_kit`."""

    @magic_arguments()
    @argument("-o", "--output", metavar="NAME", help="assign the Measurement to this variable")
    @argument(
        "--repeat", type=int, default=1, metavar="N", help="run the cell N times; figures get a between-repeat interval"
    )
    @argument("--warmup", type=int, default=0, metavar="N", help="run the cell N times before, outside the window")
    @argument("--tokens", metavar="EXPR", help="output tokens of one run, evaluated after each run: 'out.shape[1] - 7'")
    @argument("--label", default="cell", help="a name for the measurement")
    @argument("--save", metavar="FOLDER", help="write the record to FOLDER/<run_id>/ (read it with lem_kit.load)")
    @output_can_be_silenced
    @cell_magic
    def measure_energy(self, line: str, cell: str) -> Any:
        """Measure the energy of a cell: `%%measure_energy [options]` as its first line."""
        from . import session

        __tracebackhide__ = True  # between the magic's line and the user's own lines there is nothing to see
        options = self._options(line)
        tokens = _expression(options.tokens)
        run = self._compiled(line, cell)
        for _ in range(options.warmup):
            run()
        value = problem = None
        window = None
        try:
            with session().window(options.label, config=_config(options)) as window:
                for _ in range(options.repeat):
                    with window.repeat() if options.repeat > 1 else contextlib.nullcontext(window) as span:
                        value = run()
                    if tokens and not problem:
                        span.output_tokens, problem = self._count(tokens)
                if problem:
                    window.reasons.append("tokens_unknown")
        finally:
            if window is not None:
                self._keep(window.measurement, options)
        if problem:
            raise MeasureUsageError(f"--tokens {options.tokens!r} {problem}. The energy was measured and is kept.")
        return value

    def _options(self, line: str) -> argparse.Namespace:
        try:
            options = type(self).measure_energy.parser.parse_args(shlex.split(line))
        except (UsageError, ValueError) as error:
            raise MeasureUsageError(str(error)) from None
        if options.repeat < 1:
            raise MeasureUsageError(f"--repeat must be at least 1: got {options.repeat}")
        if options.warmup < 0:
            raise MeasureUsageError(f"--warmup must not be negative: got {options.warmup}")
        if options.output is not None and not options.output.isidentifier():
            raise MeasureUsageError(f"-o takes the name of a variable: got {options.output!r}")
        if not options.label:
            raise MeasureUsageError("--label must not be empty")
        return options

    def _compiled(self, line: str, cell: str) -> Callable[[], Any]:
        """The cell as a function that runs it in the user's namespace and returns the value of its last expression.

        The source is cached under a name of its own, magic line included, so that tracebacks show the user's lines with
        the numbers they have in the cell.
        """
        shell = self.shell
        blank = len(cell) - len(cell.lstrip("\n"))  # IPython drops blank lines at the start; they count for line numbers
        source = "\n" * blank + shell.transform_cell(cell)
        history = shell.history_manager.input_hist_raw
        number = len(history) - 1 if history[-1].rstrip().endswith(cell.rstrip()) else shell.execution_count
        name = shell.compile.cache(f"%%measure_energy {line}\n{source}", number, raw_code=cell)
        tree = shell.transform_ast(shell.compile.ast_parse(f"\n{source}", filename=name))
        flags = shell.compile.flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        body = compile(tree, name, "exec", flags, dont_inherit=True)
        tail = compile(ast.Expression(last.value), name, "eval", flags, dont_inherit=True) if last else None
        if any(code is not None and code.co_flags & inspect.CO_COROUTINE for code in (body, tail)):
            raise MeasureUsageError(
                "a cell with top-level `await` cannot be measured yet: use Session.window around the await"
            )

        def run() -> Any:
            __tracebackhide__ = "__ipython_bottom__"  # IPython then leaves out the frames above the user's own
            exec(body, shell.user_global_ns, shell.user_ns)
            return eval(tail, shell.user_global_ns, shell.user_ns) if tail else None

        return run

    def _count(self, tokens: Any) -> tuple[int | None, str | None]:
        """The number of output tokens, or what is wrong with the expression."""
        try:
            value = eval(tokens, self.shell.user_global_ns, self.shell.user_ns)
            number = int(value)
        except Exception as error:
            return None, f"could not be evaluated: {type(error).__name__}: {error}"
        if number != value or number < 0 or isinstance(value, bool):
            return None, f"is not a number of tokens: {value!r}"
        return number, None

    def _keep(self, measurement: Measurement, options: argparse.Namespace) -> None:
        if options.output:
            self.shell.user_ns[options.output] = measurement
        display(measurement)
        if options.save:
            store.save(measurement, Path(options.save).expanduser())


def _expression(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return compile(text, "--tokens", "eval")
    except SyntaxError as error:
        raise MeasureUsageError(f"--tokens {text!r} is not a Python expression: {error.msg}") from None


def _config(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("repeat", "warmup", "tokens")}
