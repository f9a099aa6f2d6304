"""Data sets laid out as they are published, whose answers the pictures determine, and a small model to fine-tune."""

from __future__ import annotations

import json
import random
from pathlib import Path

import av
from PIL import Image

from look_alikes.tree import encoded, write
from sclkern import SCLConfig, SCLModel
from sclkern.data.convert import convert
from sclkern.data.convert.plan import Options
from sclkern.data.tokenizer import CaptionTokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}
MORE_COLOURS = {"yellow": (230, 220, 30), "pink": (240, 60, 200), "cyan": (40, 220, 230), "grey": (110, 110, 110)}
# Of fine-tuning in seconds.
QUICK = {
    "run.batch_size": 32,
    "run.device": "cpu",
    "run.log_every": 5,
    "task.global_batch": 32,
    "task.epochs": 4,
    "task.val_epochs": 2,
    "optimizer.learning_rate": 1e-3,
    "optimizer.head_factor": 1,
    "optimizer.fusion_factor": 1,
    "data.transform": "clip_test",
}


def square(colour: str, generator: random.Random) -> Image.Image:
    """A picture in which a square of a colour lies somewhere on black."""
    image = Image.new("RGB", (32, 32))
    side = generator.randint(16, 24)
    left, top = generator.randint(0, 32 - side), generator.randint(0, 32 - side)
    image.paste((COLOURS | MORE_COLOURS)[colour], (left, top, left + side, top + side))
    return image


def checkpoint(folder: Path, **changes: object) -> Path:
    """A pre-trained model of random weights, with its tokenizer."""
    config = SCLConfig.preset("tiny").replace(
        vocab_size=2048, mask_id=2047, vision_layers=1, text_layers=1, fusion_layers=1, init_std=0.1, dropout=0.0
    )
    SCLModel(config.replace(**changes)).save_pretrained(folder)
    CaptionTokenizer.from_pretrained("demo").save_pretrained(folder)
    return folder


def overrides(**changes: object) -> list[str]:
    """Of ``QUICK`` with changes, ``section__key=value``."""
    values = {**QUICK, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [f"{name}={value}" for name, value in values.items()]


def vqav2(root: Path, pictures: int = 280) -> Path:
    """VQAv2 with two questions on each picture, the colour of its square and whether it is red, converted.

    Chance is the best constant answer to either question: 25 % and 75 %, 50 % together.
    """
    generator, names, number = random.Random(0), list(COLOURS), 0
    folders = {"train": "train2014", "val": "val2014", "test": "test2015"}
    for split, folder in folders.items():
        asked, answered = [], []
        for index in range({"train": pictures, "val": pictures // 4, "test": 8}[split]):
            colour = names[index % len(names)]
            path = root / "raw" / folder / f"COCO_{folder}_{number:012}.jpg"
            write(path, encoded(square(colour, generator), "PNG"))
            pairs = (("What colour is the square?", colour), ("Is it red?", "yes" if colour == "red" else "no"))
            for place, (question, answer) in enumerate(pairs):
                key = {"image_id": number, "question_id": 10 * number + place}
                asked.append({**key, "question": question})
                answers = [{"answer": answer, "answer_id": i + 1} for i in range(10)]
                answered.append({**key, "multiple_choice_answer": answer, "answers": answers})
            number += 1
        write(root / "raw" / f"v2_OpenEnded_mscoco_{folder}_questions.json", {"questions": asked})
        if split == "test":
            write(root / "raw" / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked})
        else:
            write(root / "raw" / f"v2_mscoco_{folder}_annotations.json", {"annotations": answered})
    convert("vqav2", root / "raw", root / "arrow", Options(rest_val=2), workers=1)
    return root / "arrow"


def nlvr2(root: Path, pairs: int = 256) -> Path:
    """NLVR2 with two sentences on each pair of pictures, of which one is true half of the time, converted.

    Pairs come in sets of two that have the same sentences: of one set the first picture is red, of the other the
    second. Chance is 50 % accuracy and 25 % consistency.
    """
    generator, lines = random.Random(1), {"train": list[str](), "dev": list[str](), "test1": list[str]()}
    for split, count in {"train": pairs, "dev": pairs // 4, "test1": 8}.items():
        for number in range(count):
            identifier = f"{split}-{number // 2}-{number % 2}"
            folder = f"images/train/{number % 3}" if split == "train" else split
            red = generator.randint(0, 1)
            for side in (0, 1):
                colour = "red" if side == red else "blue"
                path = root / "raw" / folder / f"{identifier}-img{side}.png"
                write(path, encoded(square(colour, generator), "PNG"))
            sentences = ("The left square is red.", "The right square is red.")
            for place, sentence in enumerate(sentences):
                record = {"sentence": sentence, "identifier": f"{identifier}-{place}", "label": str(place == red)}
                lines[split].append(json.dumps({**record, "directory": number % 3}))
    for split, of_split in lines.items():
        write(root / "raw" / "nlvr2" / "data" / f"{split}.json", "\n".join(of_split) + "\n")
    convert("nlvr2", root / "raw", root / "arrow", Options(), workers=1)
    return root / "arrow"


def flickr30k(root: Path, pictures: int = 256) -> Path:
    """Flickr30K, with two captions that name the colour of a picture's square, converted.

    Held-out pictures are 8, each of another colour: chance of the first candidate is 1 of 8 in either direction.
    """
    folders = {"train": "flickr30k-images", "val": "flickr30k-images", "test": "flickr30k-images"}
    captioned(root / "raw", "dataset_flickr30k.json", "flickr30k", {"train": pictures, "val": 8, "test": 8}, folders)
    convert("flickr30k", root / "raw", root / "arrow", Options(), workers=1)
    return root / "arrow"


def coco(root: Path, pictures: int = 256) -> Path:
    """COCO, as ``flickr30k``; a quarter of the pictures to train on are those of restval."""
    counts = {"train": pictures - pictures // 4, "restval": pictures // 4, "val": 8, "test": 8}
    folders = {split: "train2014" if split == "train" else "val2014" for split in counts}
    captioned(root / "raw", "karpathy/dataset_coco.json", "coco", counts, folders)
    convert("coco", root / "raw", root / "arrow", Options(), workers=1)
    return root / "arrow"


def captioned(raw: Path, listing: str, dataset: str, counts: dict[str, int], folders: dict[str, str]) -> None:
    """Write pictures of a square with two captions each, in Karpathy's form."""
    generator, images, number = random.Random(2), list[dict[str, object]](), 0
    names = [*COLOURS, *MORE_COLOURS]
    for split, count in counts.items():
        for index in range(count):
            colour, file = names[index % len(names)], f"{number}.jpg"
            write(raw / folders[split] / file, encoded(square(colour, generator), "PNG"))
            texts = (f"a {colour} square", f"there is a square, it is {colour}")
            # Of training also in other words, so that captions of different pictures differ.
            trained = split in ("train", "restval")
            said = [{"raw": f"{text} {number}" if trained else text, "imgid": number} for text in texts]
            image = {"filename": file, "filepath": folders[split], "imgid": number, "split": split, "sentences": said}
            images.append({**image, "cocoid": number})
            number += 1
    write(raw / listing, {"images": images, "dataset": dataset})


def lsmdc(root: Path, clips: int = 512) -> Path:
    """LSMDC as folders of frames, whose captions name the colour of a square, which is between black frames; converted.

    Held-out clips are 8, each of another colour: chance of the first candidate is 1 of 8 in either direction.
    """
    generator, number, names = random.Random(3), 0, [*COLOURS, *MORE_COLOURS]
    for split, count in {"training": clips, "val": len(names), "public": len(names)}.items():
        lines = []
        for index in range(count):
            colour, clip = names[index % len(names)], f"0001_FILM_00.00.00.000-00.00.04.000-{number}"
            for frame in range(4):
                image = square(colour, generator) if frame in (0, 3) else Image.new("RGB", (32, 32))
                write(root / "raw" / "0001_FILM" / clip / f"{clip}_{frame:06}.jpg", encoded(image, "PNG"))
            text = f"SOMEONE sees a {colour} square" + (f" {index}" if split == "training" else "")
            lines.append(f"{clip}\t00:01\t00:05\t00:01\t00:05\t{text}\n")
            number += 1
        stem = "LSMDC16_challenge_1000_publictect" if split == "public" else f"LSMDC16_annos_{split}"
        write(root / "raw" / f"{stem}.csv", "".join(lines))
    convert("lsmdc", root / "raw", root / "raw", Options(), workers=1)
    return root / "raw"


def msrvtt(root: Path, clips: int = 64) -> Path:
    """MSRVTT with the files of CLIP4Clip, of clips of a square whose colour the captions name; converted.

    Clips of the test split are 8, each of another colour: chance of the first candidate is 1 of 8.
    """
    generator, names = random.Random(4), [*COLOURS, *MORE_COLOURS]
    sentences, test = list[dict[str, object]](), ["video_id,sentence"]
    for number in range(clips + len(names)):
        colour, clip = names[number % len(names)], f"video{number}"
        write_frames(root / "raw" / "videos" / "all" / f"{clip}.mp4", [square(colour, generator) for _ in range(4)])
        if number < clips:
            sentences += [{"video_id": clip, "caption": f"a {colour} square {number} {i}"} for i in range(20)]
        else:
            test.append(f"{clip},a {colour} square")
    write(root / "raw" / "MSRVTT_data.json", {"sentences": sentences})
    write(root / "raw" / "MSRVTT_train.9k.csv", "video_id\n" + "".join(f"video{n}\n" for n in range(clips)))
    write(root / "raw" / "MSRVTT_JSFUSION_test.csv", "\n".join(test) + "\n")
    convert("msrvtt", root / "raw", root / "arrow", Options(frames=4), workers=1)
    return root / "arrow"


def write_frames(path: Path, frames: list[Image.Image]) -> None:
    """Write a clip of these frames, without loss of their colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *frames[0].size, "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
