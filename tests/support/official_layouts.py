"""The data sets of `pipeline/data/DATASETS.md` in miniature, in the layouts that their publishers give them."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.support.pairs import pair, tar_bytes
from tests.support.shards_command import save_image, write_lines


def write_official_layouts(folder: Path) -> None:
    """Write each data set of DATASETS.md in miniature, with the publishers' names of folders, files and fields."""

    def image(path: str) -> bytes:
        return save_image(folder / path, len(list(folder.rglob("*.*"))) % 251)

    def split_file(name: str, splits: tuple[str, ...], files: list[str], **fields: str) -> None:
        images = [
            {"filename": file, "split": split, "imgid": n, "sentences": [{"raw": f"caption {n} {i}"} for i in range(5)]}
            for n, (file, split) in enumerate(zip(files, splits, strict=True))
        ]
        write_lines(folder / f"dataset_{name}.json", {"images": [image | fields for image in images], "dataset": name})

    coco = [f"COCO_val2014_{number:012d}.jpg" for number in range(1, 5)]
    flickr = [f"{number}.jpg" for number in (1007129816, 1009434119, 101362133)]
    for name in (*(f"coco/val2014/{name}" for name in coco), *(f"flickr30k-images/{name}" for name in flickr)):
        image(name)
    split_file("coco", ("train", "restval", "val", "test"), coco, filepath="val2014")
    split_file("flickr30k", ("train", "val", "test"), flickr)
    image("val2017/000000000139.jpg")
    captions = {"images": [{"id": 139, "file_name": "000000000139.jpg", "height": 6, "width": 8}]}
    captions["annotations"] = [{"image_id": 139, "id": number, "caption": f"caption {number}"} for number in range(5)]
    write_lines(folder / "annotations" / "captions_val2017.json", captions)
    for name in ("VG_100K/1.jpg", "VG_100K_2/2.jpg"):
        image(f"visual_genome/{name}")
    region = {"region_id": 1382, "width": 8, "height": 6, "image_id": 1, "phrase": "the clock is green", "y": 5, "x": 4}
    regions = [{"regions": [region, region | {"phrase": "shade along the street"}], "id": number} for number in (1, 2)]
    write_lines(folder / "visual_genome" / "region_descriptions.json", regions)
    qas = [
        {"a_objects": [], "question": "What is it?", "image_id": 1, "qa_id": n, "answer": "A clock."} for n in range(9)
    ]
    write_lines(folder / "visual_genome" / "question_answers.json", [{"id": 1, "qas": qas}, {"id": 2, "qas": []}])
    for name in ("cc3m", "sbu"):  # img2dataset's output
        (folder / "data" / name).mkdir(parents=True)
        rows = {"000000000": pair(0) | {"txt": b"a caption"}, "000000001": pair(1) | {"txt": b"another"}}
        (folder / "data" / name / "00000.tar").write_bytes(tar_bytes(rows))
        write_lines(folder / "data" / name / "00000_stats.json", {"count": 3, "successes": 2})
        (folder / "data" / name / "00000.parquet").write_bytes(b"PAR1")
    for name in (
        "train/n01440764/n01440764_18",
        "train/n01443537/n01443537_2",
        "val/n01440764/ILSVRC2012_val_00000293",
    ):
        image(f"imagenet/{name}.JPEG")
    (folder / "imagenet" / "val" / "n01443537").mkdir()
    for split in ("train2014", "val2014"):
        image(f"coco/{split}/COCO_{split}_000000000009.jpg")
        questions = [{"image_id": 9, "question": "Is it green?", "question_id": n} for n in range(9000, 9009)]
        answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]
        people = {"image_id": 9, "multiple_choice_answer": "yes", "answers": answers}
        annotations = [people | {"question_id": question["question_id"]} for question in questions]
        write_lines(
            folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"data_subtype": split, "questions": questions}
        )
        write_lines(folder / f"v2_mscoco_{split}_annotations.json", {"annotations": annotations})
    for split, place in (("train", "train/37/"), ("dev", "dev/"), ("test1", "test1/")):
        for side in (0, 1):
            image(f"nlvr2/images/{place}{split}-850-0-img{side}.png")
        statement = {"identifier": f"{split}-850-0-0", "sentence": "Both are grey.", "label": "True"}
        write_lines(folder / "nlvr2" / f"{split}.json", statement | ({"directory": 37} if split == "train" else {}))
    data = [{"bytes": image(f"hf{number}.jpg"), "path": f"{number}.jpg"} for number in range(2)]
    texts = {
        "sentences": [[{"raw": "one", "tokens": ["one"]}, {"raw": "two", "tokens": ["two"]}]] * 2,
        "cocoid": [1, 2],
    }
    for file, columns in {
        "hf_flickr/data/test-00000-of-00001": {
            "image": data,
            "caption": [["one", "two"]] * 2,
            "split": ["train", "test"],
        },
        "hf_cifar/plain_text/train-00000-of-00001": {"img": data, "label": [1, 0]},
        "hf_cifar/plain_text/test-00000-of-00001": {"img": data, "label": [1, 0]},
        "hf_coco/data/validation-00000-of-00001": {"image": data, **texts},
    }.items():
        names = json.dumps({"info": {"features": {"label": {"names": ["airplane", "bird"], "_type": "ClassLabel"}}}})
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table(columns).replace_schema_metadata({"huggingface": names} if "label" in columns else {})
        pyarrow.parquet.write_table(table, folder / f"{file}.parquet")
