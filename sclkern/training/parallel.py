"""How the processes of a run share its model: DDP, FSDP2, or one process by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sclkern.errors import UserError
from sclkern.model import SCLModel
from sclkern.models.config import SCLConfig
from sclkern.models.layers import PostNormBlock, PreNormBlock
from sclkern.objectives import ObjectiveConfig
from sclkern.training.config import PretrainConfig
from sclkern.training.world import World

# Gradients that are reduced together where DDP does not do it: enough to fill a link, little beside a model.
_BUCKET_BYTES = 64 * 2**20


class Parallel:
    """One process by itself.

    Args:
        model: on its device.
        world: the processes.

    Attributes:
        world: the processes.
        model: the model, whose parameters the optimiser updates.
        call: the model as training calls it.
        writers: group on CPUs of processes that each have a part of the weights and write it; None if each has all.
        kind: class of the model.
    """

    world: World
    model: SCLModel
    call: Callable[..., Any]
    writers: dist.ProcessGroup | None
    kind: type[SCLModel]

    def __init__(self, model: SCLModel, world: World) -> None:
        self.writers = None
        self.model, self.world = model, world
        self.call = model
        # Before FSDP gives it a class of its own.
        self.kind = type(model)

    def begin(self) -> None:
        """Begin to train: the weights are those that training starts from, and the optimiser has its groups."""

    def leave_out_unreached(self) -> None:
        """Take parameters that no loss reaches out of the gradient, so that no process waits for theirs.

        The optimiser, whose groups are made already, keeps them there, and skips them as it skips any parameter without
        a gradient. Of other classes than ``SCLModel`` every parameter is reached.
        """
        if self.kind is SCLModel:
            reached = reached_parameters(self.model.config, self.model.objectives)
            for name, parameter in self.model.named_parameters():
                if name not in reached:
                    parameter.requires_grad_(False)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Context of the forward and backward of a micro-batch.

        Args:
            last: whether gradients are summed over the processes in this backward; in the others they are kept.

        Returns:
            The context.
        """
        return nullcontext()

    def finish_gradients(self) -> None:
        """After the last backward of a step: average over the processes what the backward did not."""

    def clip_gradients(self, limit: float | None) -> Tensor:
        """Clip the gradient of the whole model to a norm.

        Args:
            limit: the norm; None does not clip.

        Returns:
            0-d, the norm before.
        """
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        return _full(norm)

    @contextmanager
    def whole_model(self) -> Iterator[SCLModel]:
        """The model with all of its weights in this process, to evaluate or to export; entered by all processes."""
        yield self.model


class _Ddp(Parallel):
    _wrapped: DistributedDataParallel

    def begin(self) -> None:
        self.leave_out_unreached()
        # Weights come from rank 0.
        self.call = self._wrapped = DistributedDataParallel(
            self.model,
            gradient_as_bucket_view=True,
            # A step of images may leave the temporal positions of clips out.
            find_unused_parameters=self.model.config.max_frames > 0 and self.model.config.image_temporal == "none",
        )

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        with nullcontext() if last else self._wrapped.no_sync():
            yield


class _AfterReplay(Parallel):
    """Gradients of CUDA graphs, whose buffers are averaged when the last replay has written them."""

    def begin(self) -> None:
        _take_weights_of_rank_0(self.model)

    def finish_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(to) for part, to in zip(parts, bucket, strict=True)])


class _Fsdp(Parallel):
    def __init__(self, model: SCLModel, world: World) -> None:
        super().__init__(model, world)
        _take_weights_of_rank_0(model)
        mesh = init_device_mesh(next(model.parameters()).device.type, (world.size,))
        # FSDP cannot cut what has no dimension: each process keeps the temperature.
        self._kept = {parameter for parameter in model.parameters() if not parameter.ndim}
        for module in list(model.modules()):
            if isinstance(module, (PreNormBlock, PostNormBlock)):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=self._kept)
        # Besides ``forward``, what training calls from outside.
        register_fsdp_forward_method(model, "contrast_features")

    def begin(self) -> None:
        self.leave_out_unreached()
        # A group of its own: checkpoints are written while training goes on.
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # every process is in it
        self.writers = group

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        yield

    def finish_gradients(self) -> None:
        for parameter in self._kept:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world.size

    @contextmanager
    def whole_model(self) -> Iterator[SCLModel]:
        model = self.model
        with torch.device("meta"):
            whole = self.kind(model.config, model.objectives, model.step)
        whole.set_backend(model.execution.backend).set_layer_norm(model.execution.layer_norm)
        whole.load_state_dict({name: _full(value) for name, value in model.state_dict().items()}, assign=True)
        yield whole.train(model.training)


def share_model(model: SCLModel, config: PretrainConfig, world: World) -> Parallel:
    """Let the processes of a run train one model. Its optimiser is built afterwards, and then ``begin`` is called.

    Args:
        model: on its device.
        config: of the run, checked by ``check_parallel``.
        world: the processes.

    Returns:
        What trains it.
    """
    if world.size == 1:
        return Parallel(model, world)
    if config.run.parallel == "fsdp":
        return _Fsdp(model, world)
    return (_AfterReplay if config.run.cuda_graphs else _Ddp)(model, world)


def reached_parameters(config: SCLConfig, objectives: ObjectiveConfig) -> set[str]:
    """Names of the parameters that have a gradient after a step, found by a step of a narrow model of the same layers.

    Args:
        config: of the network.
        objectives: the recipe.

    Returns:
        The names.
    """
    narrow = config.replace(width=64, projection_dim=8, image_size=2 * config.patch_size, dropout=0.0)
    with torch.random.fork_rng(devices=()):
        model = SCLModel(narrow, objectives)
        images = torch.zeros(2, 3, narrow.image_size, narrow.image_size)
        ids = torch.full((2, min(4, narrow.max_text_len)), narrow.mask_id)
        batch = {"image": images, "false_image": images, "text_ids": ids, "text_mask": torch.ones_like(ids).bool()}
        model(batch, seed=0).total.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_parallel(config: PretrainConfig, world: World) -> None:
    """Raise unless the processes can share the work as the configuration says.

    Args:
        config: of the run.
        world: the processes.

    Raises:
        UserError: apex or CUDA graphs with FSDP; a contrastive batch that is not the batch of a step.
    """
    run = config.run
    if world.size > 1 and run.parallel == "fsdp":
        if run.cuda_graphs:
            raise UserError(
                "run.cuda_graphs: got true with run.parallel=fsdp, whose gathering of weights is not recorded; set it "
                "to false, or run.parallel=ddp"
            )
        if config.optimizer.name == "apex":
            raise UserError(
                "optimizer.name: got 'apex' with run.parallel=fsdp, whose parts of weights apex cannot update; set it "
                "to adamw, or run.parallel=ddp"
            )
    if run.contrastive_batch is None:
        return
    if run.cuda_graphs:
        raise UserError(
            "run.cuda_graphs: got true with run.contrastive_batch, whose second pass takes gradients that no "
            "recording has; set run.cuda_graphs=false or run.contrastive_batch=null"
        )
    rows = world.size * run.batch_size
    if run.contrastive_batch != rows * run.accumulation:
        needed, rest = divmod(run.contrastive_batch, rows)
        remedy = (
            f"set run.accumulation={needed}"
            if needed and not rest
            else f"set it to a multiple of {rows}, and run.accumulation to their ratio"
        )
        raise UserError(
            f"run.contrastive_batch: got {run.contrastive_batch}, expected {rows * run.accumulation}, the batch of a "
            f"step ({world.size} processes x run.batch_size {run.batch_size} x run.accumulation {run.accumulation}); "
            f"{remedy}"
        )


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _take_weights_of_rank_0(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), 0)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, at most ``_BUCKET_BYTES`` together unless one alone has more."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(tensor)
        if bucket:
            yield bucket
