"""``sclkern profile``: where the time of a training step goes."""

from __future__ import annotations

import argparse

from sclkern.cli.config_files import load
from sclkern.tools.profile import run as profile


def run(options: argparse.Namespace) -> int:
    """Record steps with torch.profiler, or with the tool that the options name."""
    config = load(options.config, options.overrides)
    if options.mark_only:
        profile.mark_steps(config, steps=options.steps, warmup=options.warmup)
        return 0
    profile.check_phase(options.phase, config)
    arguments = [f"--config={options.config}", f"--warmup={options.warmup}", *options.overrides]
    commands = profile.tool_commands(arguments, steps=options.steps, output=options.output, ncu_phase=options.phase)
    if options.nsys or options.ncu:
        tool = "nsys" if options.nsys else "ncu"
        profile.run_tool(tool, commands[tool], config, output=options.output)
        return 0
    recorded = profile.record_steps(config, steps=options.steps, warmup=options.warmup, output=options.output)
    print(profile.format_profile(recorded))
    print(f"\nwritten to {options.output}: trace.json (open it in https://ui.perfetto.dev), phases.json, phases.txt, "
          "profile.png\n\nthe same steps on a GPU with")  # fmt: skip
    print(profile.format_commands(commands))
    return 0
