"""COCO and Flickr30K in Karpathy's splits, and Visual Genome."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from look_alikes.tree import Tree, caption, write, write_picture

COCO_SPLITS = {"train": 24, "restval": 6, "val": 8, "test": 8}
FLICKR_SPLITS = {"train": 24, "val": 6, "test": 8}
# Numbers of pictures that each defect is at.
_AT = {"truncated": 3, "missing": 7, "sixth": 11, "cmyk": 1, "grey": 2}


def _sentences(number: int, count: int = 5) -> list[str]:
    text = caption(number)
    forms = ("{}", "a picture of {}", "{}, drawn", "this is {}", "here one sees {}", "and once more {}")
    return [form.format(text) for form in forms[:count]]


def _place(tree: Tree, defects: Collection[str], number: int, file: str) -> str:
    """The defect at a picture, entered into the tree."""
    defect = next((one for one in defects if _AT.get(one) == number), "")
    if defect:
        tree.defective[defect] = file
    return defect


def coco(root: Path, *, defects: Collection[str] = (), size: tuple[int, int] = (80, 64)) -> Tree:
    """COCO: train2014/, val2014/, karpathy/dataset_coco.json.

    Defects: "truncated", "missing", "sixth" (caption), "cmyk", "grey", "blank" (caption), "twice" (a record).
    """
    tree, images, number = Tree(root), list[dict[str, Any]](), 0
    for split, count in COCO_SPLITS.items():
        folder = "train2014" if split == "train" else "val2014"
        for _ in range(count):
            file = f"COCO_{folder}_{number:012}.jpg"
            defect = _place(tree, defects, number, f"{folder}/{file}")
            texts = _sentences(number, 6 if defect == "sixth" else 5)
            sentences = [{"raw": text, "tokens": text.split(), "imgid": number} for text in texts]
            if "blank" in defects and number == 5:
                sentences.append({"raw": " \n", "tokens": [], "imgid": number})
                tree.defective["blank"] = f"{folder}/{file}"
            entry = {"filepath": folder, "filename": file, "split": split, "cocoid": number, "sentences": sentences}
            images.append({**entry, "imgid": number, "sentids": list(range(len(sentences)))})
            write_picture(root / folder / file, number, defect=defect, size=size)
            if defect not in ("truncated", "missing"):
                table = f"coco_caption_karpathy_{split}"
                tree.row(table, file=f"{folder}/{file}", caption=texts, image_id=file, split=split)
            number += 1
    if "twice" in defects:
        images.append(images[0])
        tree.defective["twice"] = f"train2014/{images[0]['filename']}"
    write(root / "karpathy" / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return tree


def flickr30k(root: Path, *, defects: Collection[str] = (), size: tuple[int, int] = (80, 64)) -> Tree:
    """Flickr30K: flickr30k-images/, dataset_flickr30k.json.

    Defects: "truncated", "missing", "extra" (a picture that no record names), "swapped" (val and test).
    """
    tree, images, number = Tree(root), list[dict[str, Any]](), 0
    for split, count in FLICKR_SPLITS.items():
        said = {"val": "test", "test": "val"}.get(split, split) if "swapped" in defects else split
        for _ in range(count):
            file = f"{1000 + number}.jpg"
            defect = _place(tree, defects, number, f"flickr30k-images/{file}")
            texts = _sentences(number)
            sentences = [{"raw": text, "imgid": number} for text in texts]
            images.append({"filename": file, "imgid": number, "split": said, "sentences": sentences})
            path = f"flickr30k-images/{file}"
            write_picture(root / path, number, defect=defect, size=size)
            if defect not in ("truncated", "missing"):
                table = f"f30k_caption_karpathy_{said}"
                tree.row(table, file=path, caption=texts, image_id=file, split=said)
            number += 1
    if "extra" in defects:
        write_picture(root / "flickr30k-images" / "9999.jpg", 50)
        tree.defective["extra"] = "flickr30k-images/9999.jpg"
    write(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    return tree


def vg(root: Path, *, defects: Collection[str] = (), count: int = 40, size: tuple[int, int] = (80, 64)) -> Tree:
    """Visual Genome: VG_100K/, VG_100K_2/, region_descriptions.json, image_data.json.

    Picture 4 n is number 4 n of ``coco``, whose test set begins with number 38; picture 4 n + 1 is of ``flickr30k``.
    Defects: "truncated", "missing", "no_second_folder", "blank" (a phrase).
    """
    tree, regions, data = Tree(root), list[dict[str, Any]](), list[dict[str, Any]]()
    for number in range(count):
        folder = "VG_100K" if number % 2 else "VG_100K_2"
        file = f"{folder}/{number}.jpg"
        defect = _place(tree, defects, number, file)
        texts = _sentences(number, 3)
        phrases = [
            {"image_id": number, "region_id": 10 * number + i, "phrase": text, "x": i, "y": 2, "width": 9, "height": 5}
            for i, text in enumerate(texts)
        ]
        if "blank" in defects and number == 5:
            phrases.append({**phrases[0], "phrase": ""})
            tree.defective["blank"] = file
        regions.append({"id": number, "regions": phrases})
        coco_id = (number, None, -1, None)[number % 4]
        flickr_id = 1000 + number if number % 4 == 1 else None
        about = {"image_id": number, "coco_id": coco_id, "flickr_id": flickr_id, "width": size[0], "height": size[1]}
        data.append({**about, "url": f"https://cs.stanford.edu/people/rak248/{file}"})
        absent = "no_second_folder" in defects and folder == "VG_100K_2"
        write_picture(root / file, number, defect="missing" if absent else defect, size=size)
        if not absent and defect not in ("truncated", "missing"):
            box = {"x": [0, 1, 2], "y": [2] * 3, "width": [9] * 3, "height": [5] * 3}
            tree.row("vg", file=file, caption=texts, image_id=str(number), **box)
    write(root / "region_descriptions.json", regions)
    write(root / "image_data.json", data)
    return tree
