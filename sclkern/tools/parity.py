"""Golden cases: run the model on recorded inputs and random choices, and compare with the reference's numbers.

A golden file is a flat safetensors dictionary: ``w.`` weights under the published names, ``in.`` inputs and every
random choice, ``out.`` intermediate results, ``loss.`` losses, ``grad.scl_step.`` gradients of
``loss.scl_step_total``. Beside it may lie a JSON file whose ``grad_norms_scl_step`` holds the gradient norm of every
parameter. Only ``w.`` and ``in.`` are read to compute; the rest is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sclkern import objectives as L
from sclkern.errors import UserError
from sclkern.model import SCLModel
from sclkern.models import FusedFeatures
from sclkern.objectives import ObjectiveConfig
from sclkern.reference import MaskedText
from sclkern.step import StepMasks, run_step
from sclkern.weights import split_to_reference
from sclkern.weights.files import read_json, read_tensors
from sclkern.weights.loading import listing

VALUE_TOLERANCE = 1e-4  # times max(1, largest recorded magnitude)
NORM_TOLERANCE = 1e-3  # relative
# A key's bias cancels in the softmax: its gradient is zero up to rounding, here and in the published code.
NORM_FLOOR = 1e-6
# How names of gradients begin.
GRADIENT = "grad.scl_step."


@dataclass(frozen=True)
class Comparison:
    """One recorded number or tensor.

    Attributes:
        name: in the file.
        error: largest absolute difference.
        tolerance: largest absolute difference that is accepted.
    """

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class ParityReport:
    """What a golden file was compared with, and what it could not be.

    Attributes:
        comparisons: of every recorded tensor and norm.
        not_compared: losses, gradients and, if there are none at all, outputs without a record, each with the reason.
    """

    comparisons: tuple[Comparison, ...]
    not_compared: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every comparison holds; what has no record does not count."""
        return all(row.ok for row in self.comparisons)


def run_parity(path: str | Path, device: str = "cpu") -> ParityReport:
    """Compare every ``out.``, ``loss.`` and ``grad.`` of a golden file, and every gradient norm of its JSON.

    Args:
        path: the safetensors file; its JSON file, if any, has the same stem.
        device: on which the model runs.

    Returns:
        One comparison for each recorded tensor and norm, and what has no record.

    Raises:
        UserError: the file cannot be read, or holds no golden case that this version can compute.
    """
    path = Path(path)
    groups: dict[str, dict[str, Tensor]] = {"w": {}, "in": {}, "out": {}, "loss": {}, "grad": {}}
    for name, tensor in read_tensors(path).items():
        group, _, rest = name.partition(".")
        if group in groups:
            groups[group][rest] = tensor
    for group in ("w", "in", "loss"):
        if not groups[group]:
            raise UserError(f"{path}: no tensor begins with '{group}.', expected a golden case with w., in. and loss.")
    try:
        computed = compute(groups["w"], groups["in"], device)
    except KeyError as error:
        raise UserError(f"{path}: no tensor 'in.{error.args[0]}', which this case needs; record it too") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    recorded = {f"{group}.{name}": groups[group][name] for group in ("out", "loss", "grad") for name in groups[group]}
    for name in recorded:
        if name not in computed:
            raise UserError(
                f"{path}: {name!r} is recorded, but this version does not know how to compute it, or lacks an input "
                "'in.' for it"
            )
    rows = [_compare(name, computed[name], value, groups["in"]) for name, value in recorded.items()]
    norms, lacking = _recorded_norms(path.with_suffix(".json"), computed)
    for name, norm in norms.items():
        value = computed[GRADIENT + name].norm().item()
        rows.append(Comparison(f"norm.{name}", abs(value - norm), max(NORM_TOLERANCE * norm, NORM_FLOOR)))
    return ParityReport(tuple(rows), _without_record(computed, recorded, norms, lacking))


def _recorded_norms(file: Path, computed: Mapping[str, Tensor]) -> tuple[dict[str, float], str]:
    """The gradient norms beside a golden file, and why others are not there."""
    if not file.exists():
        return {}, f"there is no {file.name} beside the file"
    norms = read_json(file).get("grad_norms_scl_step", {})
    if not isinstance(norms, dict):
        raise UserError(f"{file}: grad_norms_scl_step is a {type(norms).__name__}, expected names and numbers")
    for name, norm in norms.items():
        if GRADIENT + name not in computed or not isinstance(norm, (int, float)):
            raise UserError(f"{file}: the norm of {name!r} is {norm!r}, expected a parameter and a number")
    return norms, f"{file.name} does not have them in grad_norms_scl_step"


def _without_record(
    computed: Mapping[str, Tensor], recorded: Mapping[str, Tensor], norms: Mapping[str, float], lacking: str
) -> tuple[str, ...]:
    left = [name for name in computed if name not in recorded and name.removeprefix(GRADIENT) not in norms]
    lines = [f"{name}: not in the file" for name in left if name.startswith("loss.")]
    # A file has some outputs, as it likes.
    if not any(name.startswith("out.") for name in recorded):
        lines.append("outputs: the file has none")
    # Where no loss reaches, there is nothing to compare.
    reached = [name for name in left if name.startswith(GRADIENT) and computed[name].any()]
    if gradients := [name.removeprefix(GRADIENT) for name in reached]:
        lines.append(f"gradients of {len(gradients)} parameters: {lacking} ({listing(gradients, 3)})")
    return tuple(lines)


def _compare(name: str, value: Tensor, recorded: Tensor, inputs: Mapping[str, Tensor]) -> Comparison:
    value, recorded = value.detach().float().cpu(), recorded.float()
    if value.numel() != recorded.numel():
        raise UserError(f"{name}: computed shape {tuple(value.shape)}, the file has {tuple(recorded.shape)}")
    difference = (value.reshape(recorded.shape) - recorded).abs()
    magnitude = recorded.abs()
    if name.endswith(".text_feats"):  # what a padded position holds is undefined
        token = inputs["text_mask"].bool()
        difference, magnitude = difference[token], magnitude[token]
    if not difference.numel():  # such as logits where nothing was masked
        return Comparison(name, 0.0, VALUE_TOLERANCE)
    tolerance = VALUE_TOLERANCE * max(1.0, magnitude.max().item())
    return Comparison(name, difference.max().item(), tolerance)


def compute(weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """Every output, loss and gradient of a golden case, under the names of the file.

    Args:
        weights: tensors under the published names.
        inputs: the inputs, without their ``in.``.
        device: on which the model runs.

    Returns:
        Tensors by name.

    Raises:
        KeyError: an input that the case needs is missing.
    """
    model = SCLModel.from_reference(weights, max_text_len=inputs["text_ids"].shape[1]).eval().to(device)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    if "patch_token_mask" in inputs:
        inputs["patch_token_mask"] = inputs["patch_token_mask"].bool()
    objectives = ObjectiveConfig.published("glscl" if "patch_token_mask" in inputs else "scl")
    # The case's loss normalises over features; the loss with the published norm over frames is recorded beside it.
    model.objectives = replace(objectives, frame_norm="features")
    video = "video" in inputs
    out = _video_case(model, inputs) if video else _image_case(model, inputs)
    model.zero_grad()
    out["loss.scl_step_total"].backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    out.update({GRADIENT + k: v for k, v in split_to_reference(model.config, gradients).items()})
    return out


def _views(
    model: SCLModel, inputs: Mapping[str, Tensor], image: Tensor
) -> tuple[dict[str, FusedFeatures], dict[str, Tensor]]:
    """The fused views of a case by name, and its unimodal outputs."""
    mask = inputs["text_mask"].bool()
    whole_text, whole_image = model.encode_text(inputs["text_ids"], mask), model.encode_image(image)
    views = {
        "complete": model.run_fusion(whole_text, mask, whole_image),
        "masked_image": model.run_fusion(whole_text, mask, model.encode_image(image, keep=inputs["keep_ids"])),
        "masked_text": model.run_fusion(model.encode_text(inputs["text_ids_scl"], mask), mask, whole_image),
    }
    if "patch_token_mask" in inputs:
        replaced = model.encode_image(image, replace=inputs["patch_token_mask"])
        views["token_masked"] = model.run_fusion(whole_text, mask, replaced)
    text_proj, image_proj = model.project(whole_text[:, 0], whole_image.cls)
    unimodal = {
        "vision.tokens": model.vision(image).tokens,
        "unimodal.text_cls": whole_text[:, 0],
        "unimodal.image_cls": whole_image.cls.mean(1),
        "unimodal.text_proj": text_proj,
        "unimodal.image_proj": image_proj,
    }
    return views, unimodal


def _named_outputs(
    model: SCLModel, views: Mapping[str, FusedFeatures], unimodal: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    out = {f"out.{name}": value for name, value in unimodal.items()}
    for name, view in views.items():
        out[f"out.{name}.text_feats"] = view.text
        out[f"out.{name}.text_cls"] = view.text_cls
        out[f"out.{name}.image_feats"] = view.image.tokens
        out[f"out.{name}.image_cls"] = view.image.cls
        out[f"out.{name}.cls_feats"] = model.pool(*view.cls)
    return out


def _masks(inputs: Mapping[str, Tensor]) -> StepMasks:
    rows, length = inputs["text_ids"].shape
    completed = inputs.get("text_scl_mask", inputs["text_ids_scl"].ne(inputs["text_ids"])).bool()
    zeros = inputs["text_ids"].new_zeros(rows)
    labels = inputs.get("itm_labels", zeros + 1)
    return StepMasks(
        keep=inputs["keep_ids"],
        replace=inputs.get("patch_token_mask"),
        mlm=MaskedText(inputs["text_ids_mlm"], inputs["text_labels_mlm"].ne(-100)),
        completion=MaskedText(inputs["text_ids_scl"], completed),
        mlm_capacity=length,
        completion_capacity=length,
        replace_capacity=inputs["patch_token_mask"].shape[1] if "patch_token_mask" in inputs else 0,
        itm_labels=labels,
        itm_keys=zeros,
        num_negatives=int((labels == 0).sum()),
    )


def _image_case(model: SCLModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    image, mask = inputs["image"], inputs["text_mask"].bool()
    views, unimodal = _views(model, inputs, image)
    out = _named_outputs(model, views, unimodal)
    batch = {"image": image, "false_image": inputs["false_image"], "text_ids": inputs["text_ids"], "text_mask": mask}
    masks = _masks(inputs)
    losses = run_step(model, model.objectives, model.step, batch, masks)
    matches = inputs["itm_labels"].bool()
    text = model.encode_text(inputs["text_ids"], mask)
    matching = model.encode_image(torch.where(matches[:, None, None, None], image, inputs["false_image"]))
    out["out.itm_logits"] = model.itm_head(model.pool(*model.run_fusion(text, mask, matching).cls))
    mlm = model.run_fusion(model.encode_text(inputs["text_ids_mlm"], mask), mask, model.encode_image(image))
    out["out.mlm_logits_at_labels"] = model.mlm_head(mlm.text[inputs["text_labels_mlm"].ne(-100)])
    pooled = model.pool(*views["complete"].cls)
    weight = model.objectives.itc_weight
    out |= {
        "loss.itm_loss": losses.itm,
        "loss.mlm_loss": losses.mlm,
        "loss.con_loss": weight * losses.itc,
        "loss.scl_image_loss": losses.mvsc,
        "loss.scl_text_loss": losses.mlsc,
        "loss.scl_step_total": losses.itm + losses.mlm + weight * losses.itc + losses.mvsc + losses.mlsc,
    }
    if losses.mltc is not None:
        out["loss.token_image_loss"] = losses.metrics["mltc_image"]
        out["loss.token_text_loss"] = losses.metrics["mltc_text"]
        out["loss.glscl_total_loss"] = losses.mvsc + losses.mlsc + model.objectives.mltc_weight * losses.mltc
    if "rank" in model.config.heads:
        out["out.rank_scores"] = model.rank_head(pooled)[:, 0]
    if "vqa" in model.config.heads:
        out["out.vqa_logits"] = model.vqa_head(pooled)
        if "vqa_targets" in inputs:
            out["loss.vqa_loss"] = L.visual_question_answering(out["out.vqa_logits"], inputs["vqa_targets"])
    if "nlvr2" in model.config.heads:
        second = model.run_fusion(text, mask, model.encode_image(inputs["false_image"]), image_type=2)
        logits = model.nlvr2_head(torch.cat([pooled, model.pool(*second.cls)], dim=-1))
        out["out.nlvr2_logits"] = logits
        out["loss.nlvr2_loss"] = L.visual_reasoning(logits, torch.arange(len(logits), device=logits.device) % 2)
    return out


def _video_case(model: SCLModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    views, unimodal = _views(model, inputs, inputs["video"])
    out = _named_outputs(model, views, unimodal)
    mask = inputs["text_mask"].bool()
    mlm = model.run_fusion(model.encode_text(inputs["text_ids_mlm"], mask), mask, model.encode_image(inputs["video"]))
    masked_image, masked_text = views["masked_image"], views["masked_text"]
    temperature = model.objectives.temperature
    head = model.mlm_head
    out["out.mlm_logits_at_labels"] = head(mlm.text[inputs["text_labels_mlm"].ne(-100)])
    con = model.objectives.itc_weight * L.image_text_contrast(
        unimodal["unimodal.image_proj"], unimodal["unimodal.text_proj"], model.contrast_temperature()
    )
    out |= {
        "loss.mlm_loss": L.masked_language_modeling(
            head.transform(mlm.text), head.decoder.weight, head.decoder.bias, inputs["text_labels_mlm"]
        )[0],
        "loss.con_loss": con,
        "loss.scl_image_loss": L.masked_vision_semantic_completion(
            masked_image.image.cls, masked_text.image.cls, temperature=temperature
        ),
        "loss.scl_text_loss": L.masked_language_semantic_completion(
            masked_text.text_cls, masked_image.text_cls, temperature=temperature
        ),
    }
    mlm_loss, text_loss, image_loss = (out[f"loss.{name}_loss"] for name in ("mlm", "scl_text", "scl_image"))
    out["loss.scl_step_total"] = mlm_loss + con + text_loss + image_loss
    over_frames = L.masked_vision_semantic_completion(
        masked_image.image.cls, masked_text.image.cls, temperature=temperature, frame_norm="published"
    )
    out["loss.scl_reference_code_loss"] = over_frames + out["loss.scl_text_loss"]
    return out


def format_table(report: ParityReport, *, everything: bool = False) -> str:
    """Format a report as text: outputs, losses and gradients one a line, norms in one line unless they fail.

    Args:
        report: of ``run_parity``.
        everything: list every norm too.

    Returns:
        Lines of text.
    """
    rows = report.comparisons
    shown = [r for r in rows if everything or not r.name.startswith("norm.") or not r.ok]
    width = max((len(r.name) for r in shown), default=4)
    lines = [f"{'':2} {'name':{width}} {'error':>9} {'tolerance':>9}"]
    lines += [f"{'ok' if r.ok else 'NO':2} {r.name:{width}} {r.error:9.2e} {r.tolerance:9.2e}" for r in shown]
    norms = [r for r in rows if r.name.startswith("norm.")]
    if norms:
        worst = max(norms, key=lambda r: r.error / r.tolerance)
        lines.append(
            f"{sum(r.ok for r in norms)} of {len(norms)} gradient norms within tolerance; nearest to it: {worst.name} "
            f"({worst.error:.1e} of {worst.tolerance:.1e})"
        )
    lines += [f"not compared: {what}" for what in report.not_compared]
    failed = [r for r in rows if not r.ok]
    rest = f", {len(report.not_compared)} of what was computed could not be compared" if report.not_compared else ""
    lines.append(f"{len(rows) - len(failed)} of {len(rows)} comparisons hold{rest}")
    return "\n".join(lines)
