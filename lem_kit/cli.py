"""`lem`: the command line, a thin one. Every command is a function of the package that a notebook can call as well."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import LemError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status. A LemError is one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except LemError as error:
        print(f"lem: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lem", description="Energy, latency and throughput of LLM inference.")
    parser.add_argument("--version", action="version", version=f"lem_kit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what can be measured and run here, and why the rest cannot")
    doctor.add_argument("--overhead", action="store_true", help="measure what the meters themselves cost (half a minute)")
    doctor.add_argument("--backend", metavar="NAME", help="also check what this backend needs")
    doctor.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="its arguments")
    doctor.set_defaults(command=_doctor)

    study = commands.add_parser("study", help="run the notebooks of a study").add_subparsers(required=True, metavar="run")
    run = study.add_parser("run", help="run what the study file asks for and the folder does not hold yet")
    run.add_argument("file", type=Path, help="a study file, for example data/studies/demo.yaml")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="where the runs go (data/<name of the study file>)")
    run.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="set a parameter")
    run.set_defaults(command=_study_run)

    search = commands.add_parser("search", help="look for the fewest joules per output token under limits on latencies")
    search.add_argument("file", type=Path, help="a search file, for example data/studies/search.yaml")
    search.add_argument("--out", type=Path, metavar="FOLDER", help="where the runs go (data/<name of the search file>)")
    search.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="set a parameter")
    search.set_defaults(command=_search)

    kernels = commands.add_parser("kernels", help="Jupyter kernels, one per backend").add_subparsers(
        required=True, metavar="install | list | remove"
    )
    install = kernels.add_parser("install", help="install a kernel for a backend, in a Python environment or a container")
    install.add_argument("backend")
    install.add_argument("--python", metavar="PATH", help="interpreter of the environment that has the engine (this one)")
    install.add_argument("--container", nargs="?", const=True, metavar="IMAGE", help="an image (the engine's official one)")
    install.add_argument("--runtime", metavar="NAME", help="docker or podman (the first that is there)")
    install.add_argument("--name", help="the kernel's name (lem-BACKEND)")
    install.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set a variable, or let it in")
    install.add_argument("--gpus", metavar="WHICH", help="of a container: all (default), none, or numbers or UUIDs")
    install.add_argument("--shm-size", metavar="SIZE", help="a /dev/shm of the container's own, for example 16g")
    install.add_argument("--run-option", action="append", default=[], metavar="OPTION", help="--run-option=--user=1000:1000")
    install.set_defaults(command=_kernels_install)
    listing = kernels.add_parser("list", help="the kernels that lem_kit installed")
    listing.set_defaults(command=_kernels_list)
    remove = kernels.add_parser("remove", help="remove a kernel that lem_kit installed")
    remove.add_argument("name")
    remove.set_defaults(command=_kernels_remove)
    for command in (install, listing, remove):
        command.add_argument("--prefix", type=Path, metavar="FOLDER", help="the environment whose Jupyter it is (this one)")

    report = commands.add_parser("report", help="write one offline HTML about a folder of runs")
    report.add_argument("folder", type=Path)
    report.set_defaults(command=_report)

    export = commands.add_parser("export", help="an executed notebook as one offline HTML file; a run in other formats")
    export.add_argument("path", type=Path, help="a notebook, a run folder, or (for --csv) a folder of runs")
    export.add_argument("--html", type=Path, metavar="FILE", help="of a notebook: the file to write (beside it)")
    export.add_argument("--boamps", type=Path, metavar="FILE", help="of a run: a BoAmps energy report, JSON")
    export.add_argument("--serving-json", type=Path, metavar="FILE", help="of a run: as vLLM's `bench serve` saves a result")
    export.add_argument("--csv", type=Path, metavar="FILE", help="of a run or a folder of runs: the columns of lem.frame")
    export.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE",
        help="what only you know of a BoAmps report: -p infraType=onPremise -p country=france",
    )  # fmt: skip
    export.set_defaults(command=_export)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from . import environment, preflight
    from .backends import backend_names
    from .energy import open_source, source_names

    if options.parameters and options.backend is None:
        raise LemError("-p is an argument of an engine: say which one with --backend NAME.")
    checks = preflight.run(options.backend, dict(_assignment(text) for text in options.parameters))
    facts = environment.describe()
    cpus = f"{facts['cpu'] or facts['machine']}, {facts['cpus_allowed'] or facts['cpu_count']} CPUs"
    print(f"lem_kit {facts['lem_kit']}, Python {facts['python']}, {facts['os']}\n{cpus}")
    print("\nEnergy sources")
    for name in source_names():
        try:
            source = open_source(name)
        except LemError as error:
            print(f"  {name:<14} no   {error}")
            continue
        try:
            domains = [
                f"{key} ({d.scope}, {d.method}{', ' + d.label if d.label else ''})" for key, d in source.domains.items()
            ]
            print(f"  {name:<14} yes  {'; '.join(domains) or 'opens; its domains are known when it has started'}")
        finally:
            source.close()
    print("\nBackends")
    for name in backend_names():
        found = preflight.engine(name)
        told = f"no   {found.finding.rstrip('.')}: {found.remedy}" if found.remedy else f"yes  {found.finding}"
        print(f"  {name:<14} {told}")
    print("\nChecks", *preflight.lines(checks), sep="\n")
    if options.overhead:
        from . import overhead

        cost = overhead.measure()
        print(f"\nOverhead of the meters ({', '.join(cost.sources) or 'none open'}), {cost.pairs} pairs: {cost.work}")
        print(f"  time lost  {100 * cost.share:+.2f} % ± {100 * cost.half_width:.2f} %")
        print(f"  sampler    {100 * cost.cpu_share:.2f} % of a core")
    return 1 if any(check.state == "failure" for check in checks) else 0


def _study_run(options: argparse.Namespace) -> int:
    from . import report, study

    overrides = dict(_assignment(text) for text in options.parameters)
    folder = options.out or Path("data") / options.file.stem
    outcomes = study.run(study.read(options.file), folder, overrides, say=print)
    print(f"\n{report.table([outcome.measurement for outcome in outcomes]).to_string(index=False)}\n")
    failed = sum(not outcome.ok for outcome in outcomes)
    if failed:
        print(
            f"lem: {failed} of {len(outcomes)} runs failed; run the same command again to repeat only those.",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _search(options: argparse.Namespace) -> int:
    from .study import search

    asked = search.read(options.file, dict(_assignment(text) for text in options.parameters))
    found = search.search(**asked, folder=options.out or Path("data") / options.file.stem, say=print)
    print(f"\n{found!r}")
    return 0 if found.best else 1


def _assignment(text: str) -> tuple[str, Any]:
    """ "name=value"; the value is read as YAML, so 4 is a number and [1, 2] a list."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise LemError(f"-p takes NAME=VALUE: got {text!r}.")
    import yaml

    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise LemError(f"-p {name}: {value!r} cannot be read as a value: {' '.join(str(error).split())}") from error


def _kernels_install(options: argparse.Namespace) -> int:
    from .jupyter import kernels

    env = {name: value if equals else None for name, equals, value in (text.partition("=") for text in options.env)}
    same = ("python", "container", "runtime", "name", "gpus", "shm_size", "prefix")
    chosen = {name: getattr(options, name) for name in same}
    folder = kernels.install(options.backend, **chosen, env=env, options=options.run_option)
    print(folder)
    (kernel,) = (kernel for kernel in kernels.installed(options.prefix) if kernel.folder == folder)
    if kernel.state != "ok":
        print(f"lem: {kernel.name} is installed, but cannot start yet: {kernel.state}", file=sys.stderr)
    return 0


def _kernels_list(options: argparse.Namespace) -> int:
    from .jupyter import kernels

    rows = [("NAME", "BACKEND", "STATE", "WHERE")]
    rows += [(kernel.name, kernel.backend, kernel.state, kernel.where) for kernel in kernels.installed(options.prefix)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def _kernels_remove(options: argparse.Namespace) -> int:
    from .jupyter import kernels

    print(f"removed {kernels.remove(options.name, options.prefix)}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from . import export

    print(export.report(options.folder))
    return 0


def _export(options: argparse.Namespace) -> int:
    from . import export

    facts = dict(_assignment(text) for text in options.parameters)
    if not options.path.exists():
        raise LemError(f"There is no notebook and no run folder {options.path}: check the path.")
    asked = {name: getattr(options, name) for name in ("boamps", "serving_json", "csv") if getattr(options, name)}
    if facts and not options.boamps:
        raise LemError("-p is for a BoAmps report: name the file to write with --boamps FILE.")
    if asked and options.path.suffix == ".ipynb":
        raise LemError(f"{options.path} is a notebook, which becomes HTML: give a run folder for other formats.")
    if options.path.is_dir() and (options.html or not asked):
        raise LemError(
            f"{options.path} is a folder: say what to write of it (--boamps, --serving-json or --csv FILE), or make a "
            f"report in HTML with `lem report {options.path}`."
        )
    if options.boamps:
        print(export.write_boamps(options.path, options.boamps, facts))
    if options.serving_json:
        print(export.write_serving_json(options.path, options.serving_json))
    if options.csv:
        print(export.write_csv(options.path, options.csv))
    if not asked:
        print(export.html(options.path, options.html or options.path.with_suffix(".html")))
    return 0
