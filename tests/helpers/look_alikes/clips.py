"""MSRVTT, LSMDC and WebVid, with clips encoded here."""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

from look_alikes.tree import Tree, caption, encoded, picture, write, write_clip


def msrvtt(
    root: Path, *, defects: Collection[str] = (), train: int = 10, test: int = 4, clip4clip: bool = False
) -> Tree:
    """MSRVTT with the lists of 1k-A, or with the CSV files of CLIP4Clip.

    Defects: "missing" (a clip of training), "nineteen" (captions), "truncated" (a clip of the test set).
    """
    tree = Tree(root)
    names = [f"video{number}" for number in range(train + test)]
    sentences: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        count = 19 if "nineteen" in defects and number == 2 else 20
        texts = [f"{caption(number)} moves, said {i}" for i in range(count)]
        sentences += [{"video_id": name, "caption": text, "sen_id": 20 * number + i} for i, text in enumerate(texts)]
        defect = ""
        if "missing" in defects and number == 1:
            defect = "missing"
        if "truncated" in defects and number == train:
            defect = "truncated"
        file = f"videos/all/{name}.mp4"
        if defect:
            tree.defective[defect] = file
        write_clip(root / file, number, frames=6 + number, defect=defect)
        if not defect:
            if number < train:
                tree.row("msrvtt_train", video=file, caption=texts, image_id=name, split="train")
            else:
                tree.row("msrvtt_test", video=file, caption=[texts[number % 20]], image_id=name, split="test")
    if "nineteen" in defects:
        tree.defective["nineteen"] = "videos/all/video2.mp4"
    # The list of captions is in no order.
    sentences = sentences[1::2] + sentences[::2]
    if clip4clip:
        write(root / "MSRVTT_train.9k.csv", "video_id\n" + "".join(f"{name}\n" for name in names[:train]))
        buffer = io.StringIO()
        table = csv.writer(buffer)
        table.writerow(("key", "vid_key", "video_id", "sentence"))
        for number, name in enumerate(names[train:], train):
            table.writerow((f"ret{number}", f"msr{number}", name, f"{caption(number)} moves, said {number % 20}"))
        write(root / "MSRVTT_JSFUSION_test.csv", buffer.getvalue())
        videos = [{"video_id": name, "split": "train"} for name in names]
        write(root / "MSRVTT_data.json", {"videos": videos, "sentences": sentences})
        return tree
    annotations = [{"image_id": one["video_id"], "caption": one["caption"], "id": one["sen_id"]} for one in sentences]
    images = [{"id": name} for name in names]
    write(root / "annotation" / "MSR_VTT.json", {"images": images, "annotations": annotations})
    lists = root / "high-quality" / "structured-symlinks"
    write(lists / "train_list_jsfusion.txt", "".join(f"{name}\n" for name in names[:train]))
    write(lists / "val_list_jsfusion.txt", "".join(f"{name}\n" for name in names[train:]))
    # The number of a clip's caption among its captions, in the order of the file.
    of_clip = {name: [one["caption"] for one in sentences if one["video_id"] == name] for name in names[train:]}
    chosen = {
        name: of_clip[name].index(f"{caption(number)} moves, said {number % 20}")
        for number, name in enumerate(names[train:], train)
    }
    write(lists / "jsfusion_val_caption_idx.pkl", pickle.dumps(chosen))
    return tree


def lsmdc(root: Path, *, defects: Collection[str] = (), frame_folders: bool = False) -> Tree:
    """LSMDC: six columns separated by tabs; clips as files, or as folders of frames at one a second.

    Defects: "missing" (a clip), "twice" (a clip with another sentence), "someone" (only the files in which persons have
    no names).
    """
    tree, number = Tree(root), 0
    files = {"train": ("training", 8), "val": ("val", 3), "test": ("test", 3), "public_test": ("public", 4)}
    for split, (file, count) in files.items():
        lines = []
        for index in range(count):
            movie = f"{number % 3:04}_FILM"
            name = f"{movie}_00.0{number % 10}.00.000-00.0{number % 10}.04.000-{number}"
            text = f"SOMEONE sees {caption(number)}."
            lines.append(f"{name}\t00:01\t00:05\t00:01\t00:05\t{text}\n")
            texts = [text]
            missing = "missing" in defects and split == "train" and index == 2
            if "twice" in defects and split == "train" and index == 4:
                lines.append(f"{name}\t00:01\t00:05\t00:01\t00:05\tAnd again {text}\n")
                texts.append(f"And again {text}")
                tree.defective["twice"] = name
            place = f"{movie}/{name}/" if frame_folders else f"{movie}/{name}.avi"
            if missing:
                tree.defective["missing"] = place
            else:
                if frame_folders:
                    for frame in range(1, 6):
                        write(root / place / f"{name}_{frame:06}.jpg", encoded(picture(number + frame)))
                else:
                    write_clip(root / place, number)
                tree.row(f"lsmdc_{split}", video=place, caption=texts, image_id=name, split=split)
            number += 1
        ending = "_someone" if "someone" in defects else ""
        stem = "LSMDC16_challenge_1000_publictect" if split == "public_test" else f"LSMDC16_annos_{file}{ending}"
        write(root / f"{stem}.csv", "".join(lines))
    return tree


def webvid(root: Path, *, defects: Collection[str] = (), headless: bool = False) -> Tree:
    """WebVid: CSV files, or the lists (caption, path) without a header.

    Defects: "missing", "truncated" (a clip).
    """
    tree, number = Tree(root), 0
    for split, count in (("train", 8), ("val", 3)):
        buffer = io.StringIO()
        table = csv.writer(buffer, delimiter="\t" if headless else ",", lineterminator="\n")
        if not headless:
            table.writerow(("videoid", "name", "page_dir", "duration"))
        for index in range(count):
            page, name, text = f"{number:06}_{number + 50:06}", str(5000 + number), f"{caption(number)}, moving"
            file = f"videos/{page}/{name}.mp4"
            defect = {1: "missing", 2: "truncated"}.get(index, "") if split == "train" else ""
            defect = defect if defect in defects else ""
            if defect:
                tree.defective[defect] = file
            table.writerow((text, file) if headless else (name, text, page, "PT00H00M02S"))
            write_clip(root / file, number, defect=defect)
            if not defect:
                tree.row(f"webvid_{split}", video=file, caption=[text], image_id=name, split=split)
            number += 1
        write(root / (f"webvid_{split}.tsv" if headless else f"results_2M_{split}.csv"), buffer.getvalue())
    return tree
