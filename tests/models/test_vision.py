from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import cpu_kernels
from sclkern import ops
from sclkern.models.layouts import Padded


def clip(rows=2, frames=3, dtype=torch.float64):
    return torch.randn(rows, frames, 3, 32, 32, dtype=dtype)


def test_a_clip_of_one_frame_is_an_image(make_model):
    model, frames = make_model(max_frames=3), clip(frames=1)
    assert torch.equal(model.vision(frames).tokens, model.vision(frames[:, 0]).tokens)


def test_images_have_the_temporal_position_of_a_first_frame_or_none(make_model):
    first, none = make_model(max_frames=3), make_model(max_frames=3, image_temporal="none")
    image, frames = clip(frames=1), clip()
    assert torch.equal(none.vision(frames).tokens, first.vision(frames).tokens)
    assert not torch.equal(none.vision(image).tokens, first.vision(image).tokens)
    without = make_model(max_frames=0)
    without.load_state_dict({k: v for k, v in none.state_dict().items() if k != "vision.temporal"})
    assert torch.equal(none.vision(image).tokens, without.vision(image).tokens)


def test_an_image_without_temporal_position_gives_the_table_gradients_of_zero(make_model):
    model = make_model(max_frames=3, image_temporal="none")
    with torch.no_grad():
        model.vision.temporal.fill_(torch.inf)
    model.vision(clip(frames=1)).tokens.sum().backward()
    # Not None: among processes, every parameter has a gradient in every step.
    assert torch.equal(model.vision.temporal.grad, torch.zeros_like(model.vision.temporal))
    assert all(p.grad.isfinite().all() for p in model.vision.parameters() if p.grad is not None)


def test_masks_of_a_clip_are_tubes(make_model):
    model, frames = make_model(max_frames=3, vision_layers=0), clip()
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    replace = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, keep, True)
    whole = model.vision(frames).patches.unflatten(1, (3, 16))
    kept = model.vision(frames, keep=keep).patches.unflatten(1, (3, 5))
    replaced = model.vision(frames, replace=replace).patches.unflatten(1, (3, 16))
    for row in range(2):
        torch.testing.assert_close(kept[row], whole[row][:, keep[row]])
        changed = (replaced[row] - whole[row]).abs().amax(-1) > 1e-9
        assert torch.equal(changed, replace[row].expand(3, -1))


def test_a_model_without_temporal_table_reads_images(make_model):
    model = make_model(max_frames=0)
    assert model.vision.temporal is None
    assert model.vision(clip()[:, 0]).tokens.shape == (2, 17, 64)


def test_the_cls_of_the_frames_come_first(make_model):
    model = make_model(max_frames=3, vision_layers=0)
    frames = clip()
    features = model.vision(frames)
    assert features.num_frames == 3
    for f in range(3):
        # Without blocks a token depends on its place and its own pixels alone.
        changed = frames.clone()
        changed[:, f] += 1
        moved = (model.vision(changed).tokens - features.tokens).abs().amax((0, 2)) > 1e-9
        patches = [3 + 16 * f + p for p in range(16)]
        assert moved.nonzero().flatten().tolist() == patches
    cls = model.vision.norm_post(
        model.vision.norm_pre(model.vision.cls + model.vision.position[0] + model.vision.temporal)
    )
    torch.testing.assert_close(features.cls, cls.expand(2, -1, -1))
    assert features.patches.shape == (2, 48, 64)


def test_one_block_passes_a_frame_to_every_cls_and_to_its_own_patches(make_model):
    model = make_model(max_frames=3, vision_layers=1)
    frames = clip()
    before = model.vision(frames)
    changed = frames.clone()
    changed[:, 1] += torch.randn(3, 32, 32, dtype=torch.float64)
    after = model.vision(changed)
    cls = (after.cls - before.cls).abs().amax((0, 2))
    assert (cls > 1e-9).all(), cls
    patches = (after.patches - before.patches).unflatten(1, (3, 16)).abs().amax((0, 3))
    assert (patches[1] > 1e-9).all(), patches[1]
    assert (patches[[0, 2]] == 0).all(), patches[[0, 2]]


def test_the_order_of_kept_patches_is_that_of_the_outputs_alone(make_model):
    model, frames = make_model(max_frames=2), clip(frames=2)
    keep = torch.tensor([[1, 4, 9, 15], [0, 2, 3, 8]])
    order = torch.tensor([2, 0, 3, 1])
    straight, shuffled = model.vision(frames, keep=keep), model.vision(frames, keep=keep[:, order])
    torch.testing.assert_close(shuffled.cls, straight.cls, rtol=1e-10, atol=1e-12)
    patches = [x.patches.unflatten(1, (2, 4)) for x in (straight, shuffled)]
    torch.testing.assert_close(patches[1], patches[0][:, :, order], rtol=1e-10, atol=1e-12)


def test_keeping_every_patch_is_keeping_none_away(make_model):
    model, frames = make_model(max_frames=2), clip(frames=2)
    every = torch.arange(16).expand(2, -1)
    assert torch.equal(model.vision(frames, keep=every).tokens, model.vision(frames).tokens)


def test_dropped_and_replaced_pixels_are_never_seen(make_model):
    model, frames = make_model(max_frames=2), clip(frames=2)
    other = frames.clone()
    other[..., :8, 8:16] += 1  # patch 1 of every frame
    keep = torch.tensor([[0, 2, 3], [5, 6, 7]])
    replace = torch.zeros(2, 16, dtype=torch.bool)
    replace[:, 1] = True
    assert torch.equal(model.vision(frames, keep=keep).tokens, model.vision(other, keep=keep).tokens)
    assert torch.equal(model.vision(frames, replace=replace).tokens, model.vision(other, replace=replace).tokens)
    assert not torch.equal(model.vision(frames).tokens, model.vision(other).tokens)


@pytest.mark.parametrize("shape", [(2, 3, 32, 24), (2, 1, 32, 32), (3, 32, 32), (2, 3, 1, 32, 32), (2, 3, 40, 40)])
def test_a_wrong_shape_is_named_with_the_right_one(make_model, shape):
    with pytest.raises(ValueError, match=r"images: got shape \(.*\), expected .* with S = 32"):
        make_model(max_frames=3).vision(torch.zeros(shape))


@pytest.mark.parametrize("table, most", [(0, 1), (2, 2)])
def test_more_frames_than_the_table_are_refused(make_model, table, most):
    with pytest.raises(ValueError, match=f"images: got 3 frames, expected at most {most} "):
        make_model(max_frames=table).vision(clip())


def test_replacing_needs_a_mask_token(make_model):
    model = make_model(patch_mask_token=False)
    with pytest.raises(ValueError, match="replace: the model has no mask token"):
        model.vision(clip()[:, 0], replace=torch.zeros(2, 16, dtype=torch.bool))


def test_training_mode_drops_nothing(make_model):
    model, frames = make_model(max_frames=3, dropout=0.5), clip()
    evaluated = model.vision(frames).tokens
    model.train()
    assert torch.equal(model.vision(frames).tokens, evaluated)


def step_by_step(vision, x, layout):
    """CLIP's pre-norm blocks: every sum, and every norm, apart."""

    def norm(module, y):
        return F.layer_norm(y, (64,), module.weight, module.bias)

    for block in vision.blocks:
        x = x + block.attention(norm(block.attention_norm, x), layout)
        x = x + block.mlp(norm(block.mlp_norm, x))
    return norm(vision.norm_post, x)


def tokens_and_gradients(encode, vision, x, grad):
    out = encode(x, Padded())
    return out.detach(), *torch.autograd.grad(
        out, [x, *vision.blocks.parameters(), *vision.norm_post.parameters()], grad
    )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)])
def test_a_sum_with_its_norm_has_the_bits_of_separate_ops(make_model, dtype, autocast, checkpointed):
    vision = make_model(dtype=dtype, vision_layers=3).vision
    vision.execution.checkpoint_blocks = checkpointed
    x, grad = torch.randn(2, 17, 64, dtype=dtype, requires_grad=True), torch.randn(2, 17, 64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = tokens_and_gradients(vision.encode, vision, x, grad)
        theirs = tokens_and_gradients(lambda *inputs: step_by_step(vision, *inputs), vision, x, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_op_behind_the_kernel_takes_every_sum_with_its_norm(make_model, monkeypatch, checkpointed):
    cpu_kernels.install()
    vision = make_model(dtype=torch.float32, vision_layers=3).vision
    vision.execution.checkpoint_blocks = checkpointed
    x, grad = torch.randn(2, 17, 64, requires_grad=True), torch.randn(2, 17, 64)
    expected = tokens_and_gradients(vision.encode, vision, x, grad)
    called, op = [], ops.dropout_add_layer_norm

    def recorded(*tensors, return_sum, **options):
        called.append(return_sum)
        return op(*tensors, return_sum=return_sum, **options)

    monkeypatch.setattr(ops, "dropout_add_layer_norm", recorded)
    monkeypatch.setattr("sclkern.ops.dispatch._problems", lambda devices, dtypes: ())
    found = tokens_and_gradients(vision.encode, vision, x, grad)
    # The first norm has nothing to add, and nobody else reads the last sum. Checkpointed blocks end with a sum of their
    # own, and run twice.
    assert called == ([True] * 6 if checkpointed else [True] * 5 + [False])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_activation_is_the_chosen_one(make_model, activation):
    model = make_model(vision_activation=activation)
    mlp = model.vision.blocks[0].mlp
    x = torch.randn(5, 64, dtype=torch.float64)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    quick = hidden * torch.sigmoid(1.702 * hidden)
    expected = quick if activation == "quick_gelu" else torch.nn.functional.gelu(hidden)
    torch.testing.assert_close(mlp(x), mlp.fc2(expected))
