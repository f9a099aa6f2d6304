"""Evaluate and fine-tune the model of `make demo` on small real tasks: python -m examples.demo_tasks"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from examples.demo_tasks import clips, pairs, questions
from examples.demo_tasks.figures import Figure
from examples.demo_tasks.page import write
from sclkern.tools.bench import records

Task = Callable[[Path, Path], list[Figure]]


def _rollouts(checkpoint: Path, folder: Path) -> list[Figure]:
    # Here, so that the other tasks run without minigrid.
    from examples.demo_tasks import rollouts

    return rollouts.run(checkpoint, folder)


TASKS: Mapping[str, Task] = {
    "pairs": pairs.run,
    "clips": clips.run,
    "rollouts": _rollouts,
    "questions": questions.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_tasks", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo"), help="run or model to begin with")
    parser.add_argument("--output", type=Path, default=Path("runs/demo_tasks"), help="folder of everything written")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="tasks to run")
    parser.add_argument("--question-steps", type=int, help="steps of easy-vqa, in place of those of the quick run")
    parser.add_argument("--record", action="store_true", help="append records to benchmarks/results")
    options = parser.parse_args()
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    for name in options.only:
        # What an earlier command has done of the task is not done again, and takes no time now.
        whole, start = not (options.output / name).exists(), time.perf_counter()
        run = TASKS[name]
        if name == "questions" and options.question_steps:
            found = questions.run(options.checkpoint, options.output / name, options.question_steps)
        else:
            found = run(options.checkpoint, options.output / name)
        took = {"seconds": time.perf_counter() - start} if whole else {}
        if took:
            seconds[name] = took["seconds"]
        figures += found
        if options.record:
            case = f"tasks/demo/{name}" + (f"/{options.question_steps}" if options.question_steps else "")
            records.append(case, **took, figures=[figure._asdict() for figure in found])
        write(options.output / "results.md", figures, seconds)
    print(f"\n{(options.output / 'results.md').read_text()}\n{options.output / 'results.md'}")


if __name__ == "__main__":
    main()
