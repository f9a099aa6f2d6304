"""Whole models: fused they compute, and learn, what they did before."""

import pytest
import torch

import sclkern

WHOLE = ["bridgetower", "blip", "vilt"]


@pytest.mark.parametrize("name", ["bert", "roberta", "clip", *WHOLE])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("path", ["cpu", "kernels"])
def test_outputs_and_gradients(name, implementation, path, make, compute, assert_agree, request):
    if implementation == "sdpa" and name in WHOLE:
        pytest.skip("transformers has no such attention for it")
    model, inputs = make(name, attn_implementation=implementation)
    expected, keys = compute(model, inputs), list(model.state_dict())
    if path == "kernels":
        request.getfixturevalue("kernels")
    with sclkern.fuse(model) as report:
        assert {left.path.split(".")[0] for left in report.left} <= {"text_model"} and (name == "clip") == bool(
            report.left
        )
        assert_agree(compute(model, inputs), expected)
        assert list(model.state_dict()) == keys
    # Reverted, to the bit.
    assert_agree(compute(model, inputs), expected, relative=0)


@pytest.mark.parametrize("name", WHOLE)
def test_twenty_steps(name, make, kernels):
    def train(fused):
        model, inputs = make(name)
        if fused:
            sclkern.fuse(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(20):
            out = model(**inputs)
            state = out.get("last_hidden_state", out.get("text_features", out.get("itm_score")))
            loss = (state - 0.5).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return torch.tensor(losses), model.state_dict()

    (losses, weights), (expected, expected_weights) = train(True), train(False)
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    # Adam steps by the sign where a gradient is rounding alone, as that of a bias of keys.
    for name, truth in expected_weights.items():
        if not name.endswith("key.bias") and truth.is_floating_point():
            assert (weights[name] - truth).abs().mean() < 1e-3 * truth.abs().mean().clamp_min(1e-2), name


@pytest.mark.parametrize("name", ["bert", *WHOLE])
def test_no_padding(name, make, compute, assert_agree, kernels):
    model, inputs = make(name)
    inputs["attention_mask"].fill_(1)
    expected = compute(model, inputs)
    sclkern.fuse(model)
    assert_agree(compute(model, inputs), expected)


@pytest.mark.parametrize("name", ["bert", *WHOLE])
def test_attention_maps_are_those_of_the_model(name, make):
    model, inputs = make(name, attn_implementation="eager")
    model.eval()

    def maps(out):
        actual = [] if not hasattr(out, "items") and not isinstance(out, (tuple, list)) else out
        for key, value in actual.items() if hasattr(actual, "items") else enumerate(actual):
            if key in ("attentions", "cross_attentions"):
                yield from flatten(value)
            elif hasattr(value, "items"):
                yield from maps(value)

    def flatten(nested):
        for value in nested or ():
            yield from [value] if torch.is_tensor(value) else flatten(value)

    torch.manual_seed(1)
    expected = list(maps(model(**inputs, output_attentions=True)))
    sclkern.fuse(model)
    model(**inputs)
    torch.manual_seed(1)
    actual = list(maps(model(**inputs, output_attentions=True)))
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_causal_decoder_stays_causal(make, compute, assert_agree):
    transformers = pytest.importorskip("transformers")
    model, inputs = make("bert")
    model.config.is_decoder = True
    decoder = transformers.BertLMHeadModel._from_config(model.config, attn_implementation="eager")
    expected = compute(decoder, inputs)
    assert len([left for left in sclkern.fuse(decoder, strict=False).left if "causal" in left.why]) == 2
    assert_agree(compute(decoder, inputs), expected)


def test_blip_captions_as_before(make):
    transformers = pytest.importorskip("transformers")
    retrieval, inputs = make("blip")
    config = retrieval.config
    config.text_config.is_decoder = True
    torch.manual_seed(0)
    model = transformers.BlipForConditionalGeneration(config).eval()

    def run():
        # It writes into the ids it is given.
        batch = {"input_ids": inputs["input_ids"].clone(), "pixel_values": inputs["pixel_values"]}
        return model(**batch).logits, model.generate(**batch, max_new_tokens=4)

    logits, tokens = run()
    sclkern.fuse(model)
    actual, actual_tokens = run()
    torch.testing.assert_close(actual, logits)
    assert torch.equal(actual_tokens, tokens)
