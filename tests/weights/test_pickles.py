"""Files of torch.save that hold objects of any class beside the weights, and files that are damaged."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import functools
import io
import operator
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sclkern.errors import UserError
from sclkern.weights.files import read_tensors

TENSORS = {"a.weight": torch.arange(2000.0).reshape(40, 50), "a.bias": torch.arange(7)}


def assert_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = TENSORS) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor.detach())


# -- objects of any class ----------------------------------------------------------------------------------------------

SOURCE = '''
import collections, dataclasses, enum, functools

class Options(dict):
    """As EasyDict, addict and AttributeDict: items that are attributes too."""
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__.update(self)

class Config(dict):
    """As yacs: a dict with state of its own."""
    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__["__immutable__"] = False

class Names(list): pass
class Pair(tuple): pass
class Ids(set): pass
class Frozen(frozenset): pass
class Text(str): pass
class Count(int): pass
class Rate(float): pass
class Raw(bytes): pass
class Ordered(collections.OrderedDict): pass
class Default(collections.defaultdict): pass
class Counts(collections.Counter): pass
class Queue(collections.deque): pass
Point = collections.namedtuple("Point", "x y")
Point.__module__ = __name__
class Kind(enum.Enum): A = 1
class Level(enum.IntEnum): LOW = 1
class Flags(enum.Flag): READ = 1; WRITE = 2

@dataclasses.dataclass
class Data:
    x: int = 1
    y: object = None

@dataclasses.dataclass(frozen=True, slots=True)
class FrozenData:
    x: int = 1

class Slots:
    __slots__ = ("a", "b")
    def __init__(self): self.a = 1; self.b = Options(c=2)

class State:
    def __getstate__(self): return ["any", {"thing": 1}]
    def __setstate__(self, state): raise RuntimeError("ran")

class Reduced:
    def __reduce__(self): return Reduced, (1,), {"s": 1}, iter([1, 2]), iter([("k", 3)])

class Keywords:
    def __new__(cls, *, a): return super().__new__(cls)
    def __getnewargs_ex__(self): return (), {"a": 1}

class Outer:
    class Inner:
        def __init__(self): self.z = 1
    class InnerKind(enum.Enum): B = 2

def function(x): return x

class Method:
    def call(self): pass
'''


OBJECTS = {
    "a class of dict": lambda m: m.Options(lr=1, net=m.Options(width=2)),
    "a dict with state": lambda m: m.Config({"A": 1, "B": m.Config({"C": 2})}),
    "nested": lambda m: m.Options(a=m.Names([m.Options(b=m.Pair((1, 2)))]), c={"d": m.Data(y=m.Kind.A)}),
    "collections": lambda m: [
        m.Names([1, 2]), m.Pair((1, 2)), m.Ids({1}), m.Frozen({2}), m.Ordered(a=1), m.Counts("aab"),
        m.Default(list, {"x": [1]}), m.Queue([1, 2]), collections.ChainMap({"a": 1}),
    ],
    "plain values": lambda m: [
        m.Text("a"), m.Count(3), m.Rate(0.5), m.Raw(b"x"), 10**400, {1, 2}, frozenset({3}), b"b", bytearray(b"c"),
        complex(1, 2), range(3), slice(1, 2), Ellipsis, NotImplemented,
    ],
    "enumerations": lambda m: [m.Kind.A, m.Level.LOW, m.Flags.READ | m.Flags.WRITE, m.Outer.InnerKind.B, {m.Kind.A: 1}],
    "records": lambda m: [m.Point(1, m.Point(2, 3)), m.Data(), m.FrozenData(), m.Slots(), types.SimpleNamespace(a=1)],
    "own pickling": lambda m: [m.State(), m.Reduced(), m.Keywords(a=1), m.Outer.Inner()],
    "callables": lambda m: [
        m.function, functools.partial(m.function, 1, k=2), m.Options, operator.itemgetter(1), len,
        operator.attrgetter("a.b"), m.Method().call, torch.nn.functional.gelu, torch.optim.AdamW,
    ],
    "the standard library": lambda m: [
        argparse.Namespace(lr=1, out=pathlib.Path("a/b")), datetime.datetime(2024, 1, 1), datetime.timedelta(1),
        datetime.UTC, decimal.Decimal("0.1"), fractions.Fraction(1, 3), pathlib.PureWindowsPath("y"),
    ],
    "numpy": lambda m: [
        np.float32(1), np.arange(3), np.array(["a"], dtype=object), np.dtype("f4"), np.bool_(True),
        np.random.RandomState(0).get_state(), np.random.default_rng(0),
    ],
    "torch": lambda m: [
        torch.float32, torch.device("cpu"), torch.Size([1, 2]), torch.nn.Linear(2, 2), torch.Generator().get_state(),
        torch.nn.Parameter(torch.ones(1)),
    ],
}  # fmt: skip


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that is there while a file is written, and gone once ``monkeypatch.undo`` was called."""
    module = types.ModuleType("absent_package")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(SOURCE, module.__dict__)
    return module


FORMATS = {
    "protocol 2": {},
    "protocol 4": {"pickle_protocol": 4},
    "protocol 5": {"pickle_protocol": 5},
    "before torch 1.6": {"_use_new_zipfile_serialization": False},
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("saved_as", FORMATS)
def test_objects_beside_the_weights(
    tmp_path: Path, module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, saved_as: str
) -> None:
    content = {"hyper_parameters": OBJECTS[kind](module), "state_dict": TENSORS, "epoch": 1}
    torch.save(content, tmp_path / "x.ckpt", **FORMATS[saved_as])
    monkeypatch.undo()
    assert_same(read_tensors(tmp_path / "x.ckpt"))


@pytest.mark.parametrize("around", ["a class of dict", "Namespace", "an object", "a module", "a part of any name"])
def test_weights_within_objects(
    tmp_path: Path, module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, around: str
) -> None:
    expected = TENSORS
    if around == "a class of dict":
        content: Any = module.Options(state_dict=module.Ordered(TENSORS), epoch=1)
    elif around == "Namespace":
        content = argparse.Namespace(model=module.Default(None, TENSORS), epoch=1)
    elif around == "an object":
        content = {"model_state_dict": types.SimpleNamespace(**TENSORS), "loss": torch.ones(())}
    elif around == "a module":
        content = {"model": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)), "ema": None}
        expected = content["model"].state_dict()
    else:
        content = {"generator": TENSORS, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3}
    torch.save(content, tmp_path / "x.ckpt")
    monkeypatch.undo()
    assert_same(read_tensors(tmp_path / "x.ckpt"), expected)


def test_several_sets_of_weights_are_not_chosen_from(tmp_path: Path) -> None:
    torch.save({"generator": TENSORS, "critic": TENSORS, "epoch": 3}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="holds 2 sets of weights, 'generator', 'critic', expected one"):
        read_tensors(tmp_path / "x.ckpt")


# -- tensors of every kind ---------------------------------------------------------------------------------------------


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    kinds = {
        **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn,
        )},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "whole": base, "view": base[3:9], "transposed": base.view(4, 6).T, "expanded": torch.ones(1).expand(5),
        "number": torch.tensor(3.0), "empty": torch.empty(0, 4),
    }  # fmt: skip
    for options in FORMATS.values():
        torch.save(kinds, tmp_path / "x.pt", **options)
        read = read_tensors(tmp_path / "x.pt")
        assert read.keys() == kinds.keys()
        for name, tensor in kinds.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape, name
            assert torch.equal(read[name].to(torch.complex128), tensor.detach().to(torch.complex128)), name


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (lambda: torch.ones(3, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda: torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
    ],
)
def test_tensors_without_plain_values(tmp_path: Path, tensor: Any, kind: str) -> None:
    torch.save({"a": torch.ones(2), "b": tensor()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"b is no plain tensor \({kind}\), expected dense values"):
        read_tensors(tmp_path / "x.pt")


def test_a_name_that_does_not_tell_the_format(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "x.bin")
    torch.save(TENSORS, tmp_path / "y.safetensors")
    for name in ("x.bin", "y.safetensors"):
        assert_same(read_tensors(tmp_path / name))


# -- nothing is run ----------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("saved_as", FORMATS)
def test_nothing_that_a_file_names_is_imported_or_called(
    tmp_path: Path, saved_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof, folder = tmp_path / "proof", tmp_path / "package"
    statement = f"__import__('pathlib').Path({str(proof)!r}).touch()"
    folder.mkdir()
    # A package that is there, and would run at its import.
    (folder / "runs_at_import.py").write_text(f"{statement}\nclass Thing: pass")
    monkeypatch.syspath_prepend(str(folder))
    imports = type("Thing", (), {"__module__": "runs_at_import", "__qualname__": "Thing"})
    attacks = [
        Call(eval, statement), Call(exec, statement), Call(subprocess.check_call, ["touch", str(proof)]),
        Call(Path.touch, proof), Call(torch.load, str(proof)), Call(functools.partial(exec, statement)),
        Call(__import__, "runs_at_import"), Call(pickle.loads, pickle.dumps(Call(exec, statement))),
        Call(torch.hub.load, str(folder), "x"), Call(getattr, proof, "touch"),
    ]  # fmt: skip
    with monkeypatch.context() as during:
        module = types.ModuleType("runs_at_import")
        module.Thing = imports  # type: ignore[attr-defined]
        during.setitem(sys.modules, "runs_at_import", module)
        torch.save(
            {"state_dict": TENSORS, "callbacks": attacks, "x": imports()}, tmp_path / "x.pt", **FORMATS[saved_as]
        )
    seen: list[str] = []
    monkeypatch.setattr("builtins.exec", lambda *a: seen.append("exec"))
    monkeypatch.setattr("builtins.eval", lambda *a: seen.append("eval"))
    assert_same(read_tensors(tmp_path / "x.pt"))
    assert not proof.exists() and not seen and "runs_at_import" not in sys.modules


@pytest.mark.parametrize("saved_as", FORMATS)
def test_calls_of_the_operating_system_are_refused(tmp_path: Path, saved_as: str) -> None:
    import os

    content = {"state_dict": TENSORS, "callbacks": Call(os.system, f"touch {tmp_path}/proof")}
    torch.save(content, tmp_path / "x.pt", **FORMATS[saved_as])
    with pytest.raises(UserError, match=r"refers to (posix|nt)\.system, .*take weights you can trust"):
        read_tensors(tmp_path / "x.pt")
    assert not (tmp_path / "proof").exists()


def test_a_pickle_cannot_change_what_reads_it(tmp_path: Path) -> None:
    """State set on a name, as on torch's function, stays with its stand-in."""

    class Attack:
        def __reduce__(self) -> Any:
            return Call, (), {"__call__": 1}, iter([]), iter([("PLAIN", 1)])

    torch.save({"state_dict": TENSORS, "x": Attack()}, tmp_path / "x.pt")
    for _ in range(2):
        assert_same(read_tensors(tmp_path / "x.pt"))


# -- damaged files -----------------------------------------------------------------------------------------------------


def flipped(data: bytes, marker: bytes) -> bytes:
    """One bit of the bytes at a marker is another."""
    at = data.index(marker)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def archive(*members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for member in members:
            file.writestr(member, b"nothing")
    return buffer.getvalue()


def damaged(tmp_path: Path, kind: str) -> bytes:
    torch.save(TENSORS, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    numbers = TENSORS["a.weight"].numpy().tobytes()
    return {
        "empty": b"",
        "zero bytes": bytes(5000),
        "a web page": b"\n<!DOCTYPE html><html>not found</html>",
        "text": b"Entry not found",
        "json": b'{"error": "Invalid credentials"}',
        "one bit of the weights": flipped(whole, numbers[40:80]),
        "one bit of a name": flipped(whole, b"a.weight"),
        "zeros within the weights": whole.replace(numbers, bytes(len(numbers))),
        "an archive of something else": archive("word/document.xml"),
        "a wrong member": archive("x/data.pkl", "x/data/0"),
        "two archives in one": archive("x/data.pkl", "y/data.pkl"),
        "without the weights": archive("x/version", "x/byteorder"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("empty", "it is empty"), ("zero bytes", "zero bytes"), ("a web page", "web page"), ("text", ""), ("json", ""),
     ("one bit of the weights", "checksum"), ("one bit of a name", "checksum"),
     ("zeros within the weights", "checksum"), ("an archive of something else", "without the member data.pkl"),
     ("a wrong member", ""), ("two archives in one", "data.pkl"), ("without the weights", "data.pkl")],
)  # fmt: skip
def test_damaged(tmp_path: Path, kind: str, reason: str) -> None:
    (tmp_path / "x.pt").write_bytes(damaged(tmp_path, kind))
    with pytest.raises(UserError, match=rf"cannot be read as a checkpoint.*{reason}.*download it again") as error:
        read_tensors(tmp_path / "x.pt")
    assert str(error.value).startswith(str(tmp_path / "x.pt")) and "\n" not in str(error.value)


def test_cut_short_anywhere(tmp_path: Path) -> None:
    small = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(small, tmp_path / "whole.pt", **options)
        data = (tmp_path / "whole.pt").read_bytes()
        for size in range(0, len(data), 7):
            (tmp_path / "x.pt").write_bytes(data[:size])
            with pytest.raises(UserError, match="cannot be read as a checkpoint"):
                read_tensors(tmp_path / "x.pt")


def test_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(TENSORS, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_tensors(tmp_path / "x.pt"))


def test_another_byte_order(tmp_path: Path) -> None:
    other = "big" if sys.byteorder == "little" else "little"
    torch.save({"a": torch.arange(3.0)}, tmp_path / "x.pt")
    swapped = np.arange(3, dtype=">f4" if other == "big" else "<f4").tobytes()
    with zipfile.ZipFile(tmp_path / "x.pt") as source, zipfile.ZipFile(tmp_path / "y.pt", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, {"byteorder": other.encode(), "0": swapped}.get(name.split("/")[-1], content))
    assert_same(read_tensors(tmp_path / "y.pt"), {"a": torch.arange(3.0)})


def test_a_pickle_of_another_program(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"is a pickle that .* did not write"):
        read_tensors(tmp_path / "x.pkl")
