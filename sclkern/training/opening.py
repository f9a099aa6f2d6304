"""A trained model with its tokenizer, from whatever training and export write."""

from __future__ import annotations

from pathlib import Path

from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.errors import UserError
from sclkern.model import SCLModel
from sclkern.training.config import build_config
from sclkern.training.directory import SavedRun, read_newest
from sclkern.weights.pretrained import CONFIG


def open_model(source: str | Path, tokenizer: str | None = None) -> tuple[SCLModel, CaptionTokenizer]:
    """Load a model and the tokenizer of its captions.

    Args:
        source: a folder of ``sclkern export`` or ``save_pretrained``; or the folder of a run, of which its model is
            taken, or its newest checkpoint where it has not ended; or one of its checkpoints.
        tokenizer: as ``data.tokenizer``; None takes that of the folder, or of the run's configuration.

    Returns:
        The model, in float32 on the CPU, in training mode, and the tokenizer.

    Raises:
        UserError: there is no such model, it has no tokenizer, or the tokenizer is not the model's.
    """
    source = Path(source).expanduser()
    source = source / "model" if (source / "model" / CONFIG).is_file() else source
    if (source / CONFIG).is_file():
        model, name = SCLModel.from_pretrained(source), str(source)
        if tokenizer is None and not (source / "tokenizer.json").is_file():
            raise UserError(
                f"{source}: has no tokenizer.json, expected the tokenizer of the model beside it; name it: --tokenizer "
                "FOLDER|NAME, such as roberta-base of a published checkpoint"
            )
    else:
        model, name = restore(read_newest(source))
    found = CaptionTokenizer.from_pretrained(tokenizer or name)
    for key in ("vocab_size", "pad_id", "mask_id", "bos_id", "eos_id"):
        expected, value = getattr(model.config, key), getattr(found, key)
        if expected != value:
            raise UserError(
                f"tokenizer: {tokenizer or name} has {key} {value}, the model of {source} was trained with {expected}; "
                "give the tokenizer that it was trained with"
            )
    return model, found


def restore(saved: SavedRun) -> tuple[SCLModel, str]:
    """Build the model of a checkpoint.

    Args:
        saved: the checkpoint.

    Returns:
        The model, in float32 on the CPU, in training mode, and ``data.tokenizer`` of its run.

    Raises:
        UserError: the checkpoint is of another version.
    """
    try:
        # The model of a task opens as any other.
        config = build_config({name: keys for name, keys in saved.state["config"].items() if name != "task"})
        model = SCLModel(config.model, config.objectives)
        model.load_state_dict(saved.state["model"])
    except (UserError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{saved.path}: is damaged, or not of this version ({reason:.200})") from error
    return model, config.data.tokenizer
