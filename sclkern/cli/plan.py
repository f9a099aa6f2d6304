"""``sclkern plan``: what a training step computes, and its arithmetic."""

from __future__ import annotations

import argparse
import json

from sclkern.cli.config_files import load
from sclkern.step.flops import describe_plan, format_plan


def run(options: argparse.Namespace) -> int:
    """Print the plan of a step as text or JSON."""
    config = load(options.config, options.overrides)
    described = describe_plan(
        config.model,
        config.objectives,
        config.step,
        caption_tokens=options.caption_tokens,
        num_frames=options.frames,
    )
    print(json.dumps(described, indent=1) if options.json else format_plan(described))
    return 0
