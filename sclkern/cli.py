"""The command line: ``sclkern pretrain | plan | parity | convert | bench | profile | doctor``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sclkern import __version__
from sclkern.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when it did what was asked, 1 when a check failed, 2 for a mistake of the user's (told in one line).
    """
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    # argparse takes positionals in one run only: overrides after an option are left over.
    if left and (options.name not in ("pretrain", "plan", "profile") or any(item.startswith("-") for item in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides += left
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        status = options.command(options)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"sclkern {options.name}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads, such as head, has enough; Python must not complain of it at its end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk or a lost file system shows wherever something is written
        place = f"{error.filename}: " if error.filename else ""
        print(f"sclkern {options.name}: error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sclkern {options.name}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sclkern", description="Vision-language pre-training with SCL.")
    parser.add_argument("--version", action="version", version=f"sclkern {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    pretrain = commands.add_parser(
        "pretrain",
        help="pre-train a model",
        description="Pre-train from a YAML configuration; without one, every value is its default.",
    )
    pretrain.add_argument("--config", metavar="FILE", help="YAML configuration, such as configs/demo.yaml")
    pretrain.add_argument("--resume", action="store_true", help="go on with the run in run.output_dir if there is one")
    pretrain.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the configuration: run.max_steps=100"
    )
    pretrain.set_defaults(command=_pretrain)

    plan = commands.add_parser(
        "plan",
        help="show what a training step computes",
        description="Show the views of a step, what is read of each, and its arithmetic beside separate padded passes.",
    )
    plan.add_argument("--config", metavar="FILE", help="YAML configuration, such as configs/pretrain_base.yaml")
    plan.add_argument("--caption-tokens", type=int, default=13, help="of every caption, with both ends (default: 13)")
    plan.add_argument("--frames", type=int, default=1, help="of every clip (default: 1, an image)")
    plan.add_argument("--json", action="store_true", help="print the same as JSON")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the configuration")
    plan.set_defaults(command=_plan)

    parity = commands.add_parser(
        "parity",
        help="compare the model with the reference's recorded numbers",
        description="Run the model on a golden file and compare every output, loss and gradient; exit 1 if any is off.",
    )
    parity.add_argument("file", help="golden .safetensors file; gradient norms come from the .json beside it")
    parity.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: cpu)")
    parity.add_argument("--json", action="store_true", help="print every comparison as JSON")
    parity.set_defaults(command=_parity)

    convert = commands.add_parser(
        "convert",
        help="convert a published SCL or METER checkpoint",
        description="Read a published checkpoint and write config.json and model.safetensors for from_pretrained.",
    )
    convert.add_argument("source", help="checkpoint file under the published names")
    convert.add_argument("output", help="folder to write")
    convert.add_argument("--image-size", type=int, help="resize the position table to this resolution in pixels")
    convert.add_argument(
        "--allow-mismatch", action="store_true", help="accept missing and extra tensors, and list them"
    )
    convert.set_defaults(command=_convert)

    bench = commands.add_parser("bench", help="measure the kernels", description="Measure the kernels.")
    benches = bench.add_subparsers(dest="bench", required=True, metavar="BENCHMARK")
    static = benches.add_parser(
        "static",
        help="compile every kernel ahead of time and read its machine code",
        description="Compile every kernel for sm_80, sm_90, sm_100 and gfx942, without a GPU, and print what the code "
        "for sm_90 uses.",
    )
    static.add_argument("--check", action="store_true", help="compare with the budget; exit 1 if anything got worse")
    static.add_argument("--update", action="store_true", help="write the budget anew, with the reasons that it has")
    static.add_argument("--json", action="store_true", help="print every figure as JSON")
    static.add_argument(
        "--target", action="append", default=[], metavar="NAME", help="compile for sm_120 or gfx950 too; repeatable"
    )
    static.add_argument("--budget", metavar="FILE", help="default: benchmarks/static_budget.json of the source tree")
    static.set_defaults(command=_bench_static)

    report = benches.add_parser(
        "report",
        help="turn records of benchmarks into tables and plots",
        description="Print the newest record of every case as Markdown tables; with --output also write report.md and "
        "plots.",
    )
    report.add_argument("files", nargs="*", metavar="FILE", help="records or folders; default: benchmarks/results")
    report.add_argument("--output", metavar="DIR", help="folder for report.md and PNG plots")
    report.add_argument("--update", metavar="FILE", help="write the tables between the markers of a document")
    report.set_defaults(command=_bench_report)

    roofline = benches.add_parser(
        "roofline",
        help="measure copy bandwidth and matrix rate of this machine",
        description="Measure and record bytes per second of a copy and operations per second of matrix products; "
        "without a GPU, also print the planned floors of every op on an H200.",
    )
    roofline.add_argument("--output", metavar="DIR", help="folder of records; default: benchmarks/results")
    roofline.set_defaults(command=_bench_roofline)

    profile = commands.add_parser(
        "profile",
        help="tell where the time of a training step goes",
        description="Take a few steps of pre-training and record them with torch.profiler: a trace, a table by phase "
        "and a picture. Prints the command lines that record the same steps with nsys and ncu.",
    )
    profile.add_argument("--config", metavar="FILE", help="YAML configuration (default: the demo's model and data)")
    profile.add_argument("--steps", type=int, default=5, help="steps to record (default: 5)")
    profile.add_argument("--warmup", type=int, default=3, help="steps to take before (default: 3)")
    profile.add_argument("--output", default="runs/profile", metavar="DIR", help="folder to write (runs/profile)")
    profile.add_argument(
        "--phase", default="backward", help="whose kernels ncu records, such as 'fusion layer 0' (default: backward)"
    )
    other = profile.add_mutually_exclusive_group()
    other.add_argument("--nsys", action="store_true", help="record with nsys instead, on a GPU")
    other.add_argument("--ncu", action="store_true", help="record one step's kernels of --phase with ncu, on a GPU")
    other.add_argument("--mark-only", action="store_true", help="mark the steps for a profiler that is attached")
    profile.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the configuration: run.batch_size=16"
    )
    profile.set_defaults(command=_profile)

    doctor = commands.add_parser(
        "doctor",
        help="tell what this machine has and which backend each op takes",
        description="Tell versions, devices and environment, and for each op which backend it takes here and why.",
    )
    doctor.add_argument("--json", action="store_true", help="print the same as JSON")
    doctor.set_defaults(command=_doctor)
    return parser


def _pretrain(options: argparse.Namespace) -> int:
    # Before torch is imported: by default its OpenMP threads spin long while they wait for each other, and as soon as
    # another process needs a core (a data worker suffices) a step takes ten times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from sclkern.training.config import load_config

    config = load_config(options.config, options.overrides)
    from sclkern.training.loop import Pretraining

    run = Pretraining(config, resume=options.resume)
    if run.run():
        from sclkern.training.report import write_report

        model = run.export()
        report = write_report(run)
        print(f"model: {model}\nreport: {report}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from sclkern.step.flops import describe_plan, format_plan
    from sclkern.training.config import load_config

    config = load_config(options.config, options.overrides)
    described = describe_plan(
        config.model,
        config.objectives,
        config.step,
        caption_tokens=options.caption_tokens,
        num_frames=options.frames,
    )
    print(json.dumps(described, indent=1) if options.json else format_plan(described))
    return 0


def _parity(options: argparse.Namespace) -> int:
    from sclkern.tools.parity import format_table, run_parity
    from sclkern.training.setup import resolve_device

    rows = run_parity(options.file, str(resolve_device(options.device)))
    if options.json:
        plain = [{"name": r.name, "error": r.error, "tolerance": r.tolerance, "ok": r.ok} for r in rows]
        print(
            json.dumps({"file": str(Path(options.file)), "ok": all(r.ok for r in rows), "comparisons": plain}, indent=1)
        )
    else:
        print(format_table(rows))
    return 0 if all(r.ok for r in rows) else 1


def _convert(options: argparse.Namespace) -> int:
    from sclkern.model import SCLModel

    model = SCLModel.from_reference(options.source, strict=not options.allow_mismatch, image_size=options.image_size)
    model.save_pretrained(options.output)
    print(f"{options.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    return 0


def _bench_static(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("triton") is None:
        raise UserError("Triton is not installed, and compiles the kernels")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET: got 1, an interpreted kernel cannot be compiled")
    from sclkern.tools.static import budget as static_budget
    from sclkern.tools.static import compilation as static

    for name in options.target:
        if name not in static.TARGETS:
            raise UserError(f"--target: got {name!r}, expected one of {', '.join(static.TARGETS)}")
    file = Path(options.budget) if options.budget else static_budget.BUDGET
    if options.check and not file.exists():
        raise UserError(f"--budget: {file} does not exist; --update writes it")
    rows = static_budget.measure(static.kernels(), dict.fromkeys((*static.REQUIRED_TARGETS, *options.target)))
    budget = static_budget.read_budget(file)
    if options.update:
        budget = static_budget.updated(rows, budget)
        static_budget.write_budget(file, budget, rows)
    failed = static_budget.check(rows, budget) if options.check or options.update else []
    if options.json:
        print(
            json.dumps({"triton": static_budget.TRITON, "failed": failed, "kernels": list(map(asdict, rows))}, indent=1)
        )
    else:
        print(static_budget.format_table(rows))
        print("".join(f"FAILED {line}\n" for line in failed), end="")
    return 1 if failed else 0


def _profile(options: argparse.Namespace) -> int:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in pre-training, which this is a part of
    from sclkern.tools.profile import run as profile
    from sclkern.training.config import load_config

    overrides = [*(() if options.config else profile.DEFAULTS), *options.overrides]
    config = load_config(options.config, overrides)
    if options.mark_only:
        profile.mark_steps(config, steps=options.steps, warmup=options.warmup)
        return 0
    profile.check_phase(options.phase, config)
    given = [f"--config={options.config}"] if options.config else []
    given += [f"--warmup={options.warmup}", *options.overrides]
    commands = profile.tool_commands(given, steps=options.steps, output=options.output, ncu_phase=options.phase)
    if options.nsys or options.ncu:
        tool = "nsys" if options.nsys else "ncu"
        profile.run_tool(tool, commands[tool], config, output=options.output)
        return 0
    found = profile.record_steps(config, steps=options.steps, warmup=options.warmup, output=options.output)
    print(profile.format_profile(found))
    print(f"\nwritten to {options.output}: trace.json (open it in https://ui.perfetto.dev), phases.json, phases.txt, "
          "profile.png\n\nthe same steps on a GPU with")  # fmt: skip
    print(profile.format_commands(commands))
    return 0


def _bench_report(options: argparse.Namespace) -> int:
    from sclkern.tools.bench import records, report

    rows = records.read(options.files or [records.RESULTS])
    text = report.report(rows)
    if options.update:
        report.update(Path(options.update), rows)
    if options.output:
        from sclkern.tools.bench.plots import write_plots

        folder = Path(options.output)
        files = write_plots(rows, folder)
        pictures = "".join(f"\n![{file.stem}]({file.name})\n" for file in files)
        (folder / "report.md").write_text(f"{text}\n{pictures}")
        print(*(folder / "report.md", *files), sep="\n", file=sys.stderr)
    print(text)
    return 0


def _bench_roofline(options: argparse.Namespace) -> int:
    from sclkern.tools.bench import records, roofline

    if options.output is None and not records.RESULTS.is_dir():
        raise UserError("--output: none given, and this is no source tree with benchmarks/results")
    rates = roofline.measure()
    file = records.append("roofline", results=Path(options.output or records.RESULTS), **rates)
    print(f"{roofline.format_rates(rates)}\nrecorded in {file}")
    if len(rates["matrix_flops_per_second"]) == 1:  # float32 alone: no GPU
        print(f"\n{roofline.planned_table()}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from sclkern.tools.doctor import examine, format_report

    found = examine()
    print(json.dumps(found, indent=1) if options.json else format_report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
