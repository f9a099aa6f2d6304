"""``sclkern profile``: where the time of a training step goes."""

from __future__ import annotations

import argparse
from pathlib import Path

from sclkern.cli.config_files import load
from sclkern.tools.profile import run as profile
from sclkern.training.preflight import join_world, place_of_process


def run(options: argparse.Namespace) -> int:
    """Record steps with torch.profiler, or with the tool that the options name."""
    config = load(options.config, options.overrides)
    place = place_of_process()
    output = Path(options.output) / f"rank{place.rank}" if place.size > 1 else Path(options.output)
    profile.check_phase(options.phase, config)
    if options.mark_only:
        with join_world(config) as world:
            profile.mark_steps(config, steps=options.steps, warmup=options.warmup, world=world)
        return 0
    arguments = [f"--config={options.config}", f"--warmup={options.warmup}", *options.overrides]
    commands = profile.tool_commands(arguments, steps=options.steps, output=output, ncu_phase=options.phase)
    if options.nsys or options.ncu:
        # The tool's own process joins the others.
        tool = "nsys" if options.nsys else "ncu"
        profile.run_tool(tool, commands[tool], config, output=output)
        return 0
    with join_world(config) as world:
        recorded = profile.record_steps(config, steps=options.steps, warmup=options.warmup, output=output, world=world)
    if world.main:
        print(profile.format_profile(recorded))
        others = f"; likewise for each rank, up to rank{world.size - 1}" if world.size > 1 else ""
        print(f"\nwritten to {output}: trace.json (open it in https://ui.perfetto.dev), phases.json, phases.txt, "
              f"profile.png{others}")  # fmt: skip
        print("\nthe same steps on a GPU with")
        print(profile.format_commands(commands))
    return 0
