"""SBU, CC3M and CC12M, as ViLT's tree and as the tars of img2dataset."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from look_alikes.tree import Tree, caption, encoded, picture, write, write_picture

# Numbers of pictures that each defect is at.
_AT = {"empty": 3, "missing": 7, "other_name": 11}


def sbu(root: Path, *, defects: Collection[str] = (), count: int = 30) -> Tree:
    """SBU as ViLT's tree. Defects: "empty", "missing", "other_name", "extra" (a picture without caption)."""
    tree = Tree(root)
    _vilt_tree(tree, "train", "annot.json", "sbu_0", defects, count)
    return tree


def cc3m(root: Path, *, defects: Collection[str] = (), count: int = 30) -> Tree:
    """CC3M as ViLT's tree; the defects of ``sbu``, in training."""
    tree = Tree(root)
    _vilt_tree(tree, "train", "train_annot.json", "conceptual_caption_train_0", defects, count)
    _vilt_tree(tree, "val", "val_annot.json", "conceptual_caption_val_0", (), 8, first=200)
    return tree


def cc12m(root: Path, *, defects: Collection[str] = (), count: int = 30) -> Tree:
    """CC12M as tars; the defects of ``img2dataset``."""
    return img2dataset(root, table="cc12m_0", defects=defects, count=count)


def _vilt_tree(
    tree: Tree, split: str, annotations: str, table: str, defects: Collection[str], count: int, first: int = 100
) -> None:
    listed = []
    for number in range(count):
        name = f"{first + number}.jpg"
        place = f"images_{split}/{number % 4:04}/{name}"
        defect = next((one for one in defects if _AT.get(one) == number), "")
        if defect:
            tree.defective[defect] = place
        # What is listed may have other folders in front, as it was written on another machine.
        listed.append([f"{number % 4:04}/{'other_' if defect == 'other_name' else ''}{name}", caption(first + number)])
        write_picture(tree.root / place, first + number, defect=defect if defect != "other_name" else "")
        if not defect:
            tree.row(table, file=place, caption=[listed[-1][1]], image_id=name, split=split)
    if "extra" in defects:
        write_picture(tree.root / f"images_{split}" / "0000" / "extra.jpg", 1)
        tree.defective["extra"] = f"images_{split}/0000/extra.jpg"
    write(tree.root / annotations, listed)


def img2dataset(
    root: Path, *, table: str = "cc12m_0", defects: Collection[str] = (), count: int = 30, tars: int = 2
) -> Tree:
    """Tars with a parquet file each.

    Defects: "empty" (a picture), "failed" (a row without a picture), "parquet" (two failed rows that only the parquet
    file has), "twice" (a key), "truncated" (the last tar).
    """
    tree = Tree(root)
    root.mkdir(parents=True, exist_ok=True)
    each = -(-count // tars)
    for shard in range(tars):
        statuses = []
        with tarfile.open(root / f"{shard:05}.tar", "w") as tar:
            for number in range(shard * each, min(count, (shard + 1) * each)):
                key = f"{shard:05}{number % each:04}"
                failed = "failed" in defects and number == 5
                content = b"" if "empty" in defects and number == 3 else encoded(picture(300 + number))
                status = "failed_to_download" if failed else "success"
                record = {"key": key, "status": status, "caption": caption(300 + number), "url": "https://a.example"}
                _add(tar, f"{key}.json", json.dumps(record).encode())
                statuses.append(status)
                if failed:
                    tree.defective["failed"] = f"{shard:05}.tar:{key}"
                    continue
                _add(tar, f"{key}.jpg", content)
                _add(tar, f"{key}.txt", caption(300 + number).encode())
                if not content:
                    tree.defective["empty"] = f"{shard:05}.tar:{key}.jpg"
                    continue
                tree.row(table, content=content, caption=[caption(300 + number)], image_id=key, split="train")
            if "twice" in defects and shard == 0:
                _add(tar, "000000000.jpg", encoded(picture(1)))
                _add(tar, "000000000.txt", b"again")
                tree.defective["twice"] = "00000.tar:000000000"
        if "parquet" in defects and shard == 0:
            statuses += ["failed_to_resize"] * 2
        pq.write_table(pa.table({"status": statuses}), root / f"{shard:05}.parquet")
        write(root / f"{shard:05}_stats.json", {"count": len(statuses), "successes": statuses.count("success")})
    if "truncated" in defects:
        path = root / f"{tars - 1:05}.tar"
        path.write_bytes(path.read_bytes()[:-12000])
        tree.defective["truncated"] = path.name
    return tree


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
