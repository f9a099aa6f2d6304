"""The command line: ``sclkern pretrain | parity | convert``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
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
    if left and (options.name != "pretrain" or any(item.startswith("-") for item in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides += left
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return options.command(options)
    except UserError as error:
        print(f"sclkern {options.name}: error: {error}", file=sys.stderr)
        return 2
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


def _parity(options: argparse.Namespace) -> int:
    from sclkern.parity import format_table, run_parity
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
    from sclkern.weights import from_reference

    model = from_reference(options.source, strict=not options.allow_mismatch, image_size=options.image_size)
    model.save_pretrained(options.output)
    print(f"{options.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    return 0
