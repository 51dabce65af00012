"""An evaluation report with every gallery full, of noise images that no encoder compresses."""

from __future__ import annotations

import numpy as np

from pipeline.evaluation.explain import ALIGNMENT_EXAMPLES, HEAT_MAP_PIXELS
from pipeline.evaluation.report import CANDIDATES, MASKED_SHOWN, RECONSTRUCTIONS_SHOWN, SHOWN
from pipeline.evaluation.report_data import (
    AlignedCaption,
    Alignments,
    CaptionsOfImage,
    ImagesOfCaption,
    MaskedCaption,
    MaskedWord,
    MeasureRow,
    RecallRow,
    ReportData,
)
from pipeline.pages.page import THUMBNAIL, thumbnail

WORD = "counterrevolutionaries"  # wider than a table column on a phone
CAPTION = " ".join([WORD, "a", "picture", "<script>alert(1)</script>"] * 9)
CONDITIONS = ["own image", "another image", "text only", "text only, language stage"]


def fullest(name: str = "recorded") -> ReportData:
    random = np.random.default_rng(0)

    def noise(side: int = THUMBNAIL) -> str:
        return thumbnail(random.integers(0, 256, (side, side, 3), dtype=np.uint8), side)

    listed = [(CAPTION, False, 0.5)] * CANDIDATES
    masked = [
        MaskedCaption(
            noise(),
            noise(),
            [(word, None) for word in CAPTION.split()] + [(WORD, 1), (WORD, 2)],
            [MaskedWord(WORD, number, [(WORD, 0.5, True)] * len(CONDITIONS)) for number in range(6)],
        )
        for _ in range(3 * MASKED_SHOWN)
    ]
    candidates = [[(noise(), False, 0.1) for _ in range(CANDIDATES)] for _ in range(2 * SHOWN)]
    sentences = [ImagesOfCaption(CAPTION, 7, images_of_caption, noise()) for images_of_caption in candidates]
    images = [CaptionsOfImage(noise(), 7, listed, [CAPTION]) for _ in range(2 * SHOWN)]
    words = CAPTION.split()
    return ReportData(
        name=name,
        stage="pairs",
        source="pairs",
        digest="d" * 64,
        checkpoint=f"s3://a-bucket/{'runs/' * 20}",
        at=1_790_000_300_000,
        pairs=5000,
        captions=25_000,
        trained_on=["pairs"],
        metrics={"pairs": 5000.0, "i2t_r1": 0.5},
        small_images=False,
        retrieval_by="itc",
        retrieval_images=5000,
        reranked_best=10,
        ks=[1, 5, 10],
        recall=[RecallRow("Image → text", "itc", [(0.5, 0.001)] * 3, 1.0, 25_000)] * 4,
        fine_tuned=[MeasureRow("Questions answered (VQA accuracy)", 0.7, CAPTION)],
        masked_rows=[MeasureRow("Masked words guessed, own image", 0.7, CAPTION)],
        images={"best": images[:SHOWN], "worst": images[SHOWN:]},
        sentences={"best": sentences[:SHOWN], "worst": sentences[SHOWN:]},
        conditions=CONDITIONS,
        masked={"helped": masked[:4], "misled": masked[4:8], "even": masked[8:]},
        reconstruction_stage="vision",
        reconstructions=[(noise(), noise(), noise()) for _ in range(RECONSTRUCTIONS_SHOWN)],
        alignments=Alignments(
            [
                AlignedCaption(noise(HEAT_MAP_PIXELS), CAPTION, [(w, noise(HEAT_MAP_PIXELS), 0.3) for w in words])
                for _ in range(ALIGNMENT_EXAMPLES)
            ],
            ["No stage trained wpa: the drawn alignment comes from features that were not trained for it."],
        ),
        skipped=[(CAPTION, 3)],
    )
