"""Models that are compiled, wrapped, tied, in other dtypes or elsewhere, and names with prefixes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.tensor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from same_state import assert_states_equal
from sclkern.errors import UserError
from sclkern.model import SCLModel
from sclkern.models import SCLConfig
from sclkern.weights import save_pretrained, to_reference

CONFIG = SCLConfig.preset("tiny").replace(
    vision_layers=1, text_layers=1, fusion_layers=1, vocab_size=99, mask_id=98, image_size=32
)


@pytest.fixture
def model() -> SCLModel:
    torch.manual_seed(0)
    return SCLModel(CONFIG)


def in_part_compiled(model: SCLModel) -> nn.Module:
    model.text = torch.compile(model.text, backend="eager")
    model.fusion.text_layers[0] = torch.compile(model.fusion.text_layers[0], backend="eager")
    return model


def compiled_in_place(model: SCLModel) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("group") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": compiled_in_place,
    "in part compiled": in_part_compiled,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
    "DDP of compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_wrapped_model_is_saved_as_the_model(tmp_path: Path, model: SCLModel, how: str, one_process: None) -> None:
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    published = {name: tensor.clone() for name, tensor in to_reference(model).items()}
    wrapped = WRAPPED[how](model)
    save_pretrained(wrapped, tmp_path)
    assert_states_equal(load_file(tmp_path / "model.safetensors"), expected)
    assert_states_equal(SCLModel.from_pretrained(tmp_path).state_dict(), expected)
    assert_states_equal(to_reference(wrapped), published)
    # The wrapper's own state, as a training script saves it.
    torch.save({"model": {f"net.{name}": t for name, t in wrapped.state_dict().items()}}, tmp_path / "model.bin")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.bin").rename(tmp_path / "pytorch_model.bin")
    assert_states_equal(SCLModel.from_pretrained(tmp_path).state_dict(), expected)


def test_tied_weights_are_saved_under_both_names(
    tmp_path: Path, model: SCLModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.mlm_head.decoder.weight = model.text.word.weight
    model.image_pooler.dense.weight = nn.Parameter(model.text_pooler.dense.weight.detach()[:])
    with caplog.at_level(logging.WARNING, "sclkern.weights"):
        model.save_pretrained(tmp_path)
    assert caplog.messages == [
        "image_pooler.dense.weight is tied to text_pooler.dense.weight: both are saved, and a loaded network has them "
        "apart",
        "mlm_head.decoder.weight is tied to text.word.weight: both are saved, and a loaded network has them apart",
    ]
    loaded = SCLModel.from_pretrained(tmp_path)
    assert_states_equal(loaded.state_dict(), model.state_dict())
    assert loaded.mlm_head.decoder.weight is not loaded.text.word.weight
    back = SCLModel.from_reference(to_reference(model), config=CONFIG)
    assert_states_equal(back.state_dict(), model.state_dict())


def test_views_and_other_layouts(tmp_path: Path, model: SCLModel) -> None:
    flat = torch.randn(2 * 64 * 64 + 3)
    model.text_pooler.dense.weight = nn.Parameter(flat[:4096].view(64, 64).T)
    model.image_pooler.dense.weight = nn.Parameter(flat[4099:].view(64, 64))
    model.text_pooler.dense.bias = nn.Parameter(torch.randn(128)[::2])
    model.image_pooler.dense.bias = nn.Parameter(torch.ones(1).expand(64))
    model.save_pretrained(tmp_path)
    assert_states_equal(SCLModel.from_pretrained(tmp_path).state_dict(), model.state_dict())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path: Path, model: SCLModel, dtype: torch.dtype) -> None:
    model.to(dtype).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    expected = {name: tensor.float() for name, tensor in model.state_dict().items()}
    assert_states_equal(SCLModel.from_pretrained(tmp_path).state_dict(), expected)
    assert_states_equal(SCLModel.from_reference(to_reference(model), config=CONFIG).state_dict(), expected)


def test_the_meta_device(tmp_path: Path, model: SCLModel) -> None:
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        for loaded in (
            SCLModel.from_pretrained(tmp_path), SCLModel.from_reference(to_reference(model), config=CONFIG)
        ):  # fmt: skip
            assert_states_equal(loaded.state_dict(), model.state_dict())
        empty = SCLModel(CONFIG)
    for call in (lambda: save_pretrained(empty, tmp_path / "new"), lambda: to_reference(empty)):
        with pytest.raises(UserError, match="is on the meta device and has no values; load its weights before"):
            call()
    assert not (tmp_path / "new").exists()


def test_weights_of_which_each_rank_has_a_part(tmp_path: Path, model: SCLModel, one_process: None) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    shards = torch.distributed.tensor.distribute_tensor(
        model.text.word.weight.detach(), mesh, [torch.distributed.tensor.Shard(0)]
    )
    model.text.word.weight = nn.Parameter(shards)
    for save in (lambda network: save_pretrained(network, tmp_path / "new"), to_reference):
        with pytest.raises(UserError, match=r"text.word.weight is spread over ranks \(DTensor\); gather the weights"):
            save(model)
    assert not (tmp_path / "new").exists()


def parametrised(model: SCLModel) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.itm_head)
    return model


class Adapter(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


def adapted(model: SCLModel) -> nn.Module:
    model.text_pooler.dense = Adapter(model.text_pooler.dense)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (parametrised, "1 weights of its config are not there under their names: itm_head.weight; take off param"),
        (adapted, "2 weights .*: text_pooler.dense.weight, text_pooler.dense.bias; take off param.* and adapters"),
        (Adapter, "got Adapter, expected an SCLNetwork or SCLModel, or one in torch.compile"),
        (lambda model: nn.Linear(2, 2), "got Linear, expected an SCLNetwork"),
        (lambda model: torch.compile(nn.Linear(2, 2), backend="eager"), "got OptimizedModule, expected an SCLNetwork"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, model: SCLModel, change: Any, message: str) -> None:
    for save in (lambda network: save_pretrained(network, tmp_path / "new"), to_reference):
        with pytest.raises(UserError, match=message):
            save(change(SCLModel(CONFIG)))
    assert not (tmp_path / "new").exists()


# -- prefixes ----------------------------------------------------------------------------------------------------------


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "student.", "student.module._orig_mod.", "net.backbone.",
     "_forward_module.model.", "_fsdp_wrapped_module.", "model.model."],
)  # fmt: skip
def test_a_prefix_of_all_names(tmp_path: Path, model: SCLModel, prefix: str) -> None:
    expected = model.state_dict()
    published = prefixed(to_reference(model), prefix)
    assert_states_equal(SCLModel.from_reference(published, config=CONFIG).state_dict(), expected)
    model.save_pretrained(tmp_path)
    save_file(prefixed(expected, prefix), tmp_path / "model.safetensors")
    assert_states_equal(SCLModel.from_pretrained(tmp_path).state_dict(), expected)


def test_wrappers_within_names(model: SCLModel) -> None:
    inner = {
        re.sub(r"^text_transformer\.", "text_transformer._orig_mod.", name).replace(
            "output.dense", "output._checkpoint_wrapped_module.dense"
        ): tensor
        for name, tensor in to_reference(model).items()
    }
    assert_states_equal(SCLModel.from_reference(inner, config=CONFIG).state_dict(), model.state_dict())


def test_other_tensors_beside_a_prefix(model: SCLModel) -> None:
    tensors = {**prefixed(to_reference(model), "model."), "accuracy": torch.ones(()), "best": torch.ones(2)}
    with pytest.raises(UserError, match=r"\(prefix 'model.' taken off .*\): 2 are not known: accuracy, best; strict="):
        SCLModel.from_reference(tensors, config=CONFIG)
    loaded = SCLModel.from_reference(tensors, config=CONFIG, strict=False)
    assert loaded.load_report.unexpected == ("accuracy", "best")
    assert_states_equal(loaded.state_dict(), model.state_dict())
    # A temperature outside the prefix is one of two, or missing.
    twice = {**tensors, "cl_temp": torch.ones(())}
    with pytest.raises(UserError, match=r"model.cl_temp and cl_temp are both cl_temp without their prefixes"):
        SCLModel.from_reference(twice, config=CONFIG, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_several_prefixes_are_not_chosen_from(model: SCLModel, strict: bool) -> None:
    published = to_reference(model)
    both = {**prefixed(published, "student."), **prefixed(published, "teacher.")}
    with pytest.raises(UserError, match=r"'student.' \(\d+ weights\), 'teacher.' \(\d+ weights\)") as error:
        SCLModel.from_reference(both, config=CONFIG, strict=strict)
    advice = re.search(r"mapping: (\{.*\})", str(error.value))
    assert advice
    chosen = eval(advice[1], {"state_dict": both})
    assert_states_equal(SCLModel.from_reference(chosen, config=CONFIG).state_dict(), model.state_dict())
    # Names without a prefix are the model's; the copy beside them is not known.
    with pytest.raises(UserError, match=r"are not known: ema\."):
        SCLModel.from_reference({**published, **prefixed(published, "ema.")}, config=CONFIG)


def test_our_own_names_are_told_from_published_ones(model: SCLModel) -> None:
    with pytest.raises(UserError, match="these are SCLModel's own: load_state_dict of an SCLModel of their config"):
        SCLModel.from_reference(model.state_dict())


def test_sources_of_other_kinds(model: SCLModel) -> None:
    for source in (model, 5, None, [("a", torch.ones(1))]):
        with pytest.raises(UserError, match=r"source: got \w+, expected a path, or tensors by name"):
            SCLModel.from_reference(source)
    content = {"epoch": 3, "state_dict": {**to_reference(model), "step": 5}}
    assert_states_equal(SCLModel.from_reference(content, config=CONFIG).state_dict(), model.state_dict())
    assert_states_equal(
        SCLModel.from_reference(nn.ParameterDict({}).state_dict() | to_reference(model), config=CONFIG).state_dict(),
        model.state_dict(),
    )


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_shard_that_is_not_the_one_of_its_index(tmp_path: Path, model: SCLModel, save: Any) -> None:
    suffix = "safetensors" if save is save_file else "bin"
    stem = "model" if save is save_file else "pytorch_model"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    CONFIG.save(tmp_path / "config.json")
    names = list(state)
    shards = {f"{stem}-1.{suffix}": names[:9], f"{stem}-2.{suffix}": names[9:]}
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    save({name: state[name] for name in names[9:]}, tmp_path / f"{stem}-2.{suffix}")
    # The other holds an older value of a tensor that is not its own.
    save(
        {**{name: state[name] for name in names[:9]}, names[20]: state[names[20]] + 1}, tmp_path / f"{stem}-1.{suffix}"
    )
    assert_states_equal(SCLModel.from_pretrained(tmp_path).state_dict(), state)
    save({name: state[name] for name in names[:8]}, tmp_path / f"{stem}-1.{suffix}")
    with pytest.raises(UserError, match=rf"no tensor '{names[8]}', but .*index.json lists it there; fetch both"):
        SCLModel.from_pretrained(tmp_path)
