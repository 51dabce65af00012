"""An evaluation report with every gallery full, of noise images that no encoder compresses."""

import numpy as np

from pipeline.evaluation import report
from pipeline.evaluation.explain import ALIGNMENT_EXAMPLES, HEAT_MAP_PIXELS
from pipeline.pages.page import THUMBNAIL, thumbnail

WORD = "counterrevolutionaries"  # wider than a table column on a phone
CAPTION = " ".join([WORD, "a", "picture", "<script>alert(1)</script>"] * 9)
CONDITIONS = ["own image", "another image", "text only", "text only, language stage"]
NOTE = "No stage trained wpa: the drawn alignment comes from features that were not trained for it."


def fullest() -> report.ReportData:
    random = np.random.default_rng(0)

    def noise(side: int = THUMBNAIL) -> str:
        return thumbnail(random.integers(0, 256, (side, side, 3), dtype=np.uint8), side)

    pieces = [(word, None) for word in CAPTION.split()] + [(WORD, 1), (WORD, 2)]
    words = [(WORD, [(name, WORD, 0.5, True) for name in CONDITIONS])] * 6
    masked = [report.MaskedCaption(noise(), noise(), pieces, words) for _ in range(3 * report.MASKED_SHOWN)]
    found = [[(noise(), False, 0.1) for _ in range(report.CANDIDATES)] for _ in range(2 * report.SHOWN)]
    captions = [report.Retrieval(CAPTION, 7, images, noise()) for images in found]
    images = [report.Retrieval(noise(), 7, [(CAPTION, False, 0.5)] * report.CANDIDATES, CAPTION) for _ in found]
    ends = slice(report.SHOWN), slice(report.SHOWN, None)
    heat = [[(word, noise(HEAT_MAP_PIXELS), 0.3) for word in CAPTION.split()] for _ in range(ALIGNMENT_EXAMPLES)]
    aligned = [report.AlignedCaption(noise(HEAT_MAP_PIXELS), CAPTION, words) for words in heat]
    recall = report.RecallRow("Image → text", "itc", [(k, 0.5, 0.001) for k in (1, 5, 10)], 1.0, 25_000)
    retrievals = report.Retrievals(*(cards[end] for cards in (images, captions) for end in ends))
    measures = [report.MeasureRow(name, 0.7, CAPTION) for name in ("Questions answered", "Masked words guessed")]
    return report.ReportData(
        run="recorded", key=report.EvalKey("pairs", None, "pairs", "d" * 64), at=1_790_000_300_000,
        checkpoint=f"s3://a-bucket/{'runs/' * 20}", pairs=5000, captions=25_000, trained_on=["pairs"],
        small_images=False, metrics={"pairs": 5000.0, "i2t_r1": 0.5}, retrieval_by="itc", retrieval_images=5000,
        reranked_best=10, recall=[recall] * 4, measures=measures, retrievals=retrievals,
        masked={"helped": masked[:4], "misled": masked[4:8], "even": masked[8:]}, reconstruction_stage="vision",
        reconstructions=[(noise(), noise(), noise()) for _ in range(report.RECONSTRUCTIONS_SHOWN)],
        alignments=report.Alignments(aligned, [NOTE]), skipped=[(CAPTION, 3)], result={},
    )  # fmt: skip
