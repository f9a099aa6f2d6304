"""Reading checkpoints of every format without running them, and writing files whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sclkern.errors import UserError
from sclkern.io import write_atomically
from sclkern.weights.files import read_json, read_tensors

TENSORS = {"a.weight": torch.arange(2000.0).reshape(40, 50), "a.bias": torch.arange(7), "extra": torch.ones(3).half()}


def save_torchscript(path: Path) -> None:
    root = nn.Module()
    root.a = nn.Module()
    for name, tensor in TENSORS.items():
        module, _, last = name.rpartition(".")
        root.get_submodule(module).register_buffer(last, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(root), path)


WRITERS = {
    "x.safetensors": lambda path: save_file(TENSORS, path),
    "x.pt": lambda path: torch.save(TENSORS, path),
    "x.bin": lambda path: torch.save(TENSORS, path, _use_new_zipfile_serialization=False),
    "x.ckpt": lambda path: torch.save({"epoch": 1, "state_dict": TENSORS, "optimizer_states": [{}]}, path),
    "x.pth": lambda path: torch.save({"model": TENSORS, "optimizer": {"state": {0: torch.ones(2)}}}, path),
    "script.pt": save_torchscript,
}


def assert_same(read: dict[str, torch.Tensor]) -> None:
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert_same(read_tensors(tmp_path / name))
    assert_same(read_tensors(str(tmp_path / name)))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("part", [0.0, 0.0005, 0.01, 0.3, 0.7, 0.97, -1])
def test_cut_short(tmp_path: Path, name: str, part: float) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    data = path.read_bytes()
    path.write_bytes(data[: -1 if part < 0 else int(part * len(data))])
    with pytest.raises(UserError, match=r"cannot be read as a checkpoint.*download it again") as error:
        read_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_directories(tmp_path: Path, suffix: str) -> None:
    save = save_file if suffix == ".safetensors" else torch.save
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = list(TENSORS)
    shards = {f"{stem}-00001-of-00002{suffix}": names[:1], f"{stem}-00002-of-00002{suffix}": names[1:]}
    for file, keys in shards.items():
        save({key: TENSORS[key] for key in keys}, tmp_path / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    index = tmp_path / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_tensors(tmp_path))

    (tmp_path / f"{stem}-00002-of-00002{suffix}").unlink()
    with pytest.raises(UserError, match=r"00002-of-00002.*no such file.*fetch the missing shard"):
        read_tensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        read_tensors(tmp_path)
    index.write_text('{"weight')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_tensors(tmp_path)

    save(TENSORS, tmp_path / f"{stem}{suffix}")
    assert_same(read_tensors(tmp_path))


def test_user_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*no such file or directory"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no weights in this directory, expected one of model\.safetensors"):
        read_tensors(tmp_path)
    for name in ("a.txt", "a.safetensors", "a.pt"):
        (tmp_path / name).write_text("a picture of a cat on a mat\n" * 9)
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            read_tensors(tmp_path / name)
    (tmp_path / "a.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_tensors(tmp_path / "a.pt")
    for content in ({}, {"epoch": 3}, [torch.ones(2)], 5):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match="holds no tensors"):
            read_tensors(tmp_path / "a.pt")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="got a JSON list, expected an object"):
        read_json(tmp_path / "list.json")


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch):
    """A module that exists while a file is written and not when it is read."""
    module = types.ModuleType("absent_package.callbacks")
    ran = []

    class ModelCheckpoint:
        def __init__(self, *arguments: object) -> None:
            ran.append(arguments)

        def __setstate__(self, state: object) -> None:
            ran.append(state)

    class Slots:
        __slots__ = ("x",)

    class Reduced:
        def __reduce__(self):
            return Reduced, (1, "two"), {"x": torch.ones(2)}

    for cls in (ModelCheckpoint, Slots, Reduced):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "absent_package", types.ModuleType("absent_package"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    ran.clear()


def test_training_checkpoint_of_absent_packages(tmp_path: Path, absent, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, slots = absent.ModelCheckpoint(1), absent.Slots()
    slots.x = [1, 2]
    content = {
        "pytorch-lightning_version": "1.3.2",
        "state_dict": TENSORS,
        "callbacks": {absent.ModelCheckpoint: {"best": torch.ones(1), "path": Path("a/b")}},
        "hyper_parameters": {"config": {"root": Path("x"), "callback": checkpoint, "set": {1, 2}}},
        "loops": [slots, absent.Reduced(), {checkpoint: 1}],
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    }
    torch.save(content, tmp_path / "epoch=1.ckpt")
    monkeypatch.undo()
    with pytest.raises(ImportError):
        __import__("absent_package.callbacks")
    before = set(torch.serialization.get_safe_globals())
    assert_same(read_tensors(tmp_path / "epoch=1.ckpt"))
    assert set(torch.serialization.get_safe_globals()) == before


class RunsOnLoading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.training = False
        self.x = torch.ones(2)

    def forward(self) -> torch.Tensor:
        return self.x

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.x, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.x, self.training = state[0], state[1]


def test_torchscript_that_runs_on_loading(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(RunsOnLoading()), tmp_path / "a.pt")
    with pytest.raises(UserError, match="code that runs on loading"):
        read_tensors(tmp_path / "a.pt")


def test_write_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file.txt"
    write_atomically(path, lambda file: file.write_text("one"))
    seen = []
    write_atomically(path, lambda file: seen.append((path.read_text(), file.write_text("two"))))
    assert seen[0][0] == "one" and path.read_text() == "two" and os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), UserError), (RuntimeError("unexpected pos 1"), UserError),
     (KeyboardInterrupt(), KeyboardInterrupt), (KeyError("bug"), KeyError)],
)  # fmt: skip
def test_a_failed_write_changes_nothing(tmp_path: Path, error: BaseException, raised: type) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(file: Path) -> None:
        file.write_text("half")
        raise error

    with pytest.raises(raised) as caught:
        write_atomically(path, write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]
    if raised is UserError:
        reason = "No space left on device" if isinstance(error, OSError) else "RuntimeError: unexpected pos 1"
        assert str(caught.value).startswith(f"{path}: cannot be written ({reason});")


def test_an_unusable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x: cannot be written \((File exists|Not a directory)\)"):
        write_atomically(tmp_path / "file" / "x", lambda file: file.write_text(""))


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from sclkern.errors import UserError
from sclkern.io import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
tensors = {"a": torch.ones(100000)}
def to_open_file(path):
    with path.open("wb") as file:
        torch.save(tensors, file)
writers = {
    "a.txt": lambda path: path.write_text("x" * 100000),
    "a.safetensors": lambda path: save_file(tensors, path),
    "a.pt": lambda path: torch.save(tensors, path),
    "b.pt": to_open_file,
}
for name, write in writers.items():
    path = Path(sys.argv[1]) / name
    path.write_text("old")
    try:
        write_atomically(path, write)
    except UserError as error:
        print(error)
    assert path.read_text() == "old", name
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets RLIMIT_FSIZE")
def test_a_real_failing_write(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("cannot be written (" in line for line in lines)
    assert all("File too large" in lines[i] for i in (0, 1, 3))
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.safetensors", "a.txt", "b.pt"]
