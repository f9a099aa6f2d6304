"""Every command and option of ``sclkern``. Imports nothing of a command, so that ``--help`` loads no torch.

A command is one function here, and the module ``sclkern.cli.<command>`` with ``run(options) -> exit status``.
"""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

from sclkern import __version__

# Of ``sclkern.data.convert``, which a test compares.
SETS = (
    "coco", "flickr30k", "vg", "sbu", "cc3m", "cc12m", "vqav2", "nlvr2", "msrvtt", "lsmdc", "webvid", "align-bench",
)  # fmt: skip
# Of ``sclkern.tasks.registered``, which a test compares.
TASKS = ("coco", "flickr30k", "image-retrieval", "lsmdc", "msrvtt", "nlvr2", "video-retrieval", "vqav2")
# Evaluated alone: no model is fine-tuned for them.
BENCHMARKS = ("align-bench",)
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="sclkern", description="Vision-language pre-training with SCL.")
    parser.add_argument("--version", action="version", version=f"sclkern {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for add in (
        _pretrain,
        _finetune,
        _evaluate,
        _plan,
        _configs,
        _data,
        _convert,
        _export,
        _visualize,
        _parity,
        _bench,
        _profile,
        _warmup,
        _doctor,
    ):
        add(commands)
    return parser


def _pretrain(commands: Commands) -> None:
    command = _add(
        commands,
        "pretrain",
        help="pre-train a model",
        description="Pre-train from a YAML configuration; without one, every key has its default.",
    )
    command.set_defaults(trains=True)
    _config(command)
    command.add_argument(
        "--resume", action="store_true", help="continue the run in run.output_dir, or start it if there is none"
    )


def _finetune(commands: Commands) -> None:
    command = _add(
        commands,
        "finetune",
        help="train a pre-trained model on a task",
        description="Train a pre-trained model on a task, and write the best model of its validations. What the "
        "configuration does not give comes from the recipe; docs/tasks.md has every task.",
    )
    command.set_defaults(trains=True)
    command.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    command.add_argument("--checkpoint", metavar="FOLDER", help="folder of a pre-trained model, or of its run")
    command.add_argument(
        "--recipe", choices=("default", "published"), default="default", help="of the task (default: default)"
    )
    _config(command)
    command.add_argument(
        "--resume", action="store_true", help="continue the run in run.output_dir, or start it if there is none"
    )


def _evaluate(commands: Commands) -> None:
    command = _add(
        commands,
        "evaluate",
        help="measure a model on a task",
        description="Answer a split of a task and print its metrics, the same for any number of processes; with "
        "--output, write them, and the file that the task's server takes.",
    )
    command.set_defaults(trains=True)
    names = (*TASKS, *BENCHMARKS)
    command.add_argument("task", choices=names, metavar="TASK", help=", ".join(names))
    command.add_argument("--checkpoint", required=True, metavar="FOLDER", help="folder of the model, or of its run")
    command.add_argument("--data", required=True, metavar="FOLDER", help="folder of the tables, local or a URL")
    command.add_argument(
        "--split", default="val", metavar="NAME", help="of the task (default: val, what the model was selected by)"
    )
    command.add_argument("--annotations", metavar="FILE", help="vqav2: as distributed, for the official accuracy")
    command.add_argument("--output", metavar="FOLDER", help="write results.json, and submission.json of the task")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as task.evaluation_batch=256")


def _plan(commands: Commands) -> None:
    command = _add(
        commands,
        "plan",
        help="show what a training step computes",
        description="Show the views of a step, the outputs that losses use, and the arithmetic compared with separate "
        "padded passes, and what a GPU holds at the peak of training; with --ledger, what it launches on a GPU and the "
        "bytes that moves, under autocast to bfloat16, counted without a GPU; with --gpus, what ranks exchange.",
    )
    _config(command)
    command.add_argument("--ledger", action="store_true", help="show launches and bytes of a step of run.batch_size")
    command.add_argument("--check", action="store_true", help="with --ledger: compare the base model with the budget")
    command.add_argument("--update", action="store_true", help="with --ledger: write the budget again")
    command.add_argument("--budget", metavar="FILE", help="another budget than benchmarks/step_budget.json")
    command.add_argument(
        "--caption-tokens", type=int, default=13, help="tokens of every caption, <s> and </s> included (default: 13)"
    )
    command.add_argument(
        "--frames", type=int, help="frames of every clip (default: data.num_frames of a model of clips, otherwise 1)"
    )
    command.add_argument(
        "--gpus", metavar="N[,N...]", help="share the step among so many GPUs: bytes of each exchange, and efficiency"
    )
    command.add_argument(
        "--link",
        type=float,
        metavar="GB/s",
        help="with --gpus: what each GPU sends and receives at once "
        "over its slowest link (default: 50, InfiniBand NDR)",
    )
    command.add_argument(
        "--rate",
        type=float,
        metavar="TFLOP/s",
        help="with --gpus or --retrieval: arithmetic that a GPU reaches (default: 396, 40 %% of an H200's peak)",
    )
    command.add_argument(
        "--retrieval",
        metavar="IMAGESxTEXTS[:CANDIDATES]",
        help="plan a retrieval instead: bytes, pairs, arithmetic and time on one GPU, such as 5000x25010:256 or "
        "5000x25010:all (default: evaluation.rerank)",
    )
    command.add_argument("--parallel", choices=("ddp", "fsdp"), help="with --gpus: instead of run.parallel")
    _json(command)


def _configs(commands: Commands) -> None:
    command = _add(
        commands,
        "configs",
        help="list the shipped configurations and every key",
        description="List the configurations that --config takes by name; with NAME, print one; with --keys, print "
        "every key with its default and its meaning.",
    )
    command.add_argument("config", nargs="?", metavar="NAME", help="print this configuration")
    command.add_argument("--keys", action="store_true", help="print every key with its default and its meaning")


def _data(commands: Commands) -> None:
    data = commands.add_parser("data", help="convert and check data sets", description="Convert and check data sets.")
    tasks = data.add_subparsers(dest="data", required=True, metavar="TASK")
    for add in (_data_convert, _data_check):
        add(tasks)


def _data_check(tasks: Commands) -> None:
    command = _add(
        tasks,
        "check",
        module="data.check",
        help="count what a data set has, and find what is broken",
        description="Read every picture and every caption: count images, pairs and splits, measure sizes, and list "
        "tables and pictures that cannot be read, samples that were left out, ids and pictures in two splits. Exit "
        "status: 0 if nothing is wrong, 1 if something is, 2 if there is no such data.",
    )
    command.add_argument(
        "source", metavar="FOLDER|SOURCE", help="folder of the data, local or a URL, or one file of it"
    )
    command.add_argument("--format", default="auto", help="as data.format (default: auto)")
    command.add_argument(
        "--tables", nargs="+", metavar="NAME", help="as data.train_tables (default: all that are there)"
    )
    command.add_argument("--split", metavar="NAME", help="read this split only")
    command.add_argument("--tokenizer", default="demo", metavar="FOLDER|NAME", help="as data.tokenizer (default: demo)")
    command.add_argument(
        "--max-text-len", type=int, default=50, metavar="TOKENS", help="captions are cut to this (default: 50)"
    )
    command.add_argument(
        "--min-size",
        type=int,
        default=16,
        metavar="PIXELS",
        help="side of a patch: least side of a picture (default: 16)",
    )
    command.add_argument("--json", metavar="FILE", help="write everything that was found as JSON")
    command.add_argument("--html", metavar="FILE", help="write a page of samples with their captions to look through")
    command.add_argument("--samples", type=int, default=60, metavar="N", help="pictures on the page (default: 60)")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")


def _data_convert(tasks: Commands) -> None:
    command = _add(
        tasks,
        "convert",
        module="data.convert",
        help="write a published data set as arrow files",
        description="Read a data set as it is distributed and write arrow files under the published names, with a card "
        "of what was found, missing, undecodable and dropped. A conversion that was stopped goes on where it was.",
    )
    command.add_argument("set", choices=SETS, metavar="SET", help=", ".join(SETS))
    command.add_argument("source", metavar="SOURCE", help="folder of the set, as docs/data.md shows it")
    command.add_argument("--output", required=True, metavar="FOLDER", help="folder of the arrow files")
    command.add_argument(
        "--resize", type=int, metavar="PIXELS", help="shrink pictures whose short side is longer (JPEG, quality 90)"
    )
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    command.add_argument(
        "--allow-missing", action="store_true", help="convert what is there, however many files are missing"
    )
    command.add_argument(
        "--without-tests-of",
        metavar="SETS",
        default="",
        help="vg: leave out pictures of the test sets of coco and flickr30k (coco,flickr30k)",
    )
    command.add_argument(
        "--answers",
        choices=("official", "published"),
        default="official",
        help="vqav2: look the annotators' answers up normalised, or raw as the published code (default: official)",
    )
    command.add_argument(
        "--rest-val", type=int, default=1000, metavar="N", help="vqav2: pictures of rest_val (default: 1000)"
    )
    command.add_argument("--seed", type=int, default=0, help="vqav2: of the draw of rest_val (default: 0)")
    command.add_argument(
        "--frames", type=int, metavar="N", help="sets of clips: write N frames of each clip instead of its file's name"
    )


def _convert(commands: Commands) -> None:
    command = _add(
        commands,
        "convert",
        help="convert a published SCL or METER checkpoint",
        description="Read a published checkpoint and write config.json and model.safetensors for from_pretrained.",
    )
    command.add_argument("source", help="checkpoint file under the published names")
    command.add_argument("output", help="folder to write")
    command.add_argument("--image-size", type=int, help="resize the position table to this resolution in pixels")
    command.add_argument(
        "--allow-mismatch", action="store_true", help="accept missing and unexpected tensors, and list them"
    )


def _export(commands: Commands) -> None:
    command = _add(
        commands,
        "export",
        help="write the model of a run or a checkpoint",
        description="Read the newest checkpoint of a run, or the one that is given, a file or a folder of FSDP, and "
        "write its model: config.json, model.safetensors and the tokenizer for from_pretrained, or model.ckpt under "
        "the published names, which convert and from_reference read.",
    )
    command.add_argument("source", help="folder of a run, or one of its checkpoints, such as RUN/checkpoints/best.pt")
    command.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    command.add_argument(
        "--format", choices=("safetensors", "published"), default="safetensors", help="default: safetensors"
    )


def _visualize(commands: Commands) -> None:
    command = _add(
        commands,
        "visualize",
        help="show what of a picture the words of its caption attend to",
        description="Write a folder with one page to look through, index.html, and PNG overlays: the attention of each "
        "word and of the whole text over a picture or the frames of a clip, and back, raw and by the relevancy rule "
        "for co-attention (arXiv 2103.15679).",
    )
    command.add_argument("checkpoint", help="folder of sclkern export, or of a run, or one of its checkpoints")
    command.add_argument("picture", help="an image file; with --frames a video file or a folder of frames")
    command.add_argument("caption", help="text of the picture, in quotes")
    command.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    command.add_argument("--frames", type=int, metavar="N", help="read a clip, N frames of it, equally spaced")
    command.add_argument(
        "--target",
        choices=("itm", "rank", "vqa"),
        help="what relevancy is for: the logit that both match, the score of retrieval, or that of the likeliest "
        "answer (default: the first that the model has)",
    )
    command.add_argument(
        "--tokenizer", metavar="FOLDER|NAME", help="as data.tokenizer (default: that of the checkpoint)"
    )


def _parity(commands: Commands) -> None:
    command = _add(
        commands,
        "parity",
        help="compare the model with recorded numbers of the published code",
        description="Run the model on a golden file, compare every recorded output, loss and gradient, and list what "
        "has no record. Exit status: 0 if every comparison holds, 1 if one does not, 2 if the file is no such case.",
    )
    command.add_argument("file", help="golden .safetensors file; gradient norms come from the .json beside it")
    command.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: cpu)")
    _json(command)


def _bench(commands: Commands) -> None:
    bench = commands.add_parser("bench", help="measure the kernels", description="Measure the kernels.")
    benches = bench.add_subparsers(dest="bench", required=True, metavar="BENCHMARK")

    static = _add(
        benches,
        "static",
        module="bench.static",
        help="compile every kernel ahead of time and read its machine code",
        description="Compile every kernel for sm_80, sm_86, sm_89, sm_90, sm_100 and sm_120, without a GPU, in "
        "the configuration that its launcher selects there, and print what the code for sm_90 uses.",
    )
    static.add_argument("--check", action="store_true", help="compare with the budget; exit 1 if anything got worse")
    static.add_argument("--update", action="store_true", help="write the budget anew and keep its reasons")
    static.add_argument("--json", action="store_true", help="print every figure as JSON")
    static.add_argument(
        "--target", action="append", default=[], metavar="NAME", help="compile for gfx942 or gfx950 too; repeatable"
    )
    static.add_argument(
        "--apart",
        choices=("none", "hot", "all"),
        default="hot",
        help="kernels that are compiled for sm_86, sm_89 and sm_120 too, where sm_80 stands for them (default: hot, "
        "those that must not spill anywhere)",
    )
    static.add_argument("--budget", metavar="FILE", help="default: benchmarks/static_budget.json of the source tree")

    report = _add(
        benches,
        "report",
        module="bench.report",
        help="turn benchmark records into tables and plots",
        description="Print the newest record of every case as Markdown tables; with --output also write report.md and "
        "plots.",
    )
    report.add_argument("files", nargs="*", metavar="FILE", help="records or folders; default: benchmarks/results")
    report.add_argument("--output", metavar="DIR", help="folder for report.md and PNG plots")
    report.add_argument("--update", metavar="FILE", help="write the tables between the markers of a document")

    record = _add(
        benches,
        "record",
        module="bench.record",
        help="keep a model's metrics on a task for the page of results",
        description="Record what a results.json of sclkern finetune or evaluate says, under the name of the model; "
        "sclkern bench report --update docs/results.md shows it beside published figures.",
    )
    record.add_argument("model", metavar="NAME", help="of the model, such as base")
    record.add_argument("file", metavar="FILE", help="results.json")
    record.add_argument(
        "scores", nargs="*", metavar="SCORE=VALUE", help="of the task's server, of vqav2 such as test_dev=0.7872"
    )
    record.add_argument("--output", metavar="DIR", help="folder of records; default: benchmarks/results")

    roofline = _add(
        benches,
        "roofline",
        module="bench.roofline",
        help="measure copy bandwidth and matrix rate of this machine",
        description="Measure and record bytes per second of a copy and operations per second of matrix products; "
        "without a GPU, also print the planned lower bound of every op on an H200.",
    )
    roofline.add_argument("--output", metavar="DIR", help="folder of records; default: benchmarks/results")


def _profile(commands: Commands) -> None:
    command = _add(
        commands,
        "profile",
        help="show where the time of a training step goes",
        description="Take a few steps of pre-training and record them with torch.profiler: a trace, a table by phase "
        "and a plot. Prints the command lines that record the same steps with nsys and ncu.",
    )
    command.set_defaults(trains=True)
    _config(command, default="demo")
    command.add_argument("--steps", type=int, default=5, help="steps to record (default: 5)")
    command.add_argument("--warmup", type=int, default=3, help="steps to take before (default: 3)")
    command.add_argument("--output", default="runs/profile", metavar="DIR", help="folder to write (runs/profile)")
    command.add_argument(
        "--phase", default="backward", help="phase whose kernels ncu records, such as 'fusion layer 0' (backward)"
    )
    tool = command.add_mutually_exclusive_group()
    tool.add_argument("--nsys", action="store_true", help="record with nsys instead, on a GPU")
    tool.add_argument("--ncu", action="store_true", help="record one step's kernels of --phase with ncu, on a GPU")
    tool.add_argument("--mark-only", action="store_true", help="mark the steps for a profiler that is attached")


def _warmup(commands: Commands) -> None:
    command = _add(
        commands,
        "warmup",
        help="compile the kernels of a training step ahead of it",
        description="Compile every kernel that a step of the configuration launches, on every core, into Triton's "
        "cache, where the first step finds them. With --target it needs no GPU: the cache may then be copied.",
    )
    _config(command, default="pretrain_base")
    command.add_argument(
        "--target", choices=("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"), help="default: this machine's GPU"
    )
    _json(command)


def _doctor(commands: Commands) -> None:
    command = _add(
        commands,
        "doctor",
        help="show what this machine has and which backend each op takes",
        description="Show versions, devices and environment, and for each op which backend it takes here and why.",
    )
    _json(command)


def _add(
    commands: Commands, name: str, *, module: str | None = None, help: str, description: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help, description=description)
    command.set_defaults(module=f"sclkern.cli.{module or name}", trains=False)
    return command


def _config(command: argparse.ArgumentParser, default: str | None = None) -> None:
    described = "a YAML file, or the name of a shipped configuration (sclkern configs lists them)"
    described += f"; default: {default}" if default else ""
    command.add_argument("--config", metavar="FILE|NAME", default=default, help=described, action=_Once)
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the configuration: run.batch_size=16"
    )


class _Once(argparse.Action):
    """An option that is refused the second time, where argparse would take the last value in silence."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given: dict[str, Any] = namespace.__dict__.setdefault("given", {})
        if self.dest in given:
            parser.error(f"{option}: got {values!r}, before {given[self.dest]!r}; keep one of them")
        given[self.dest] = values
        setattr(namespace, self.dest, values)


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print the same as JSON")
