"""Training numbers are pinned: the first three losses of a seeded run of each row, on PNG images made by the tests.

Work on speed must not change them. The tolerance allows for other processors and versions of torch, whose float32
rounding differs (two threads instead of one: up to 1e-3); a changed batch, pixel, initial weight, loss or optimizer is
far outside of it.
"""

import json

import pytest

import train
from losses import ROWS

pytestmark = pytest.mark.filterwarnings("ignore:Market-1501 in")
PINNED = {
    "softmax": (1.96043, 1.71591, 1.45309),
    "triplet": (4.83989, 4.97086, 3.96529),
    "softmax+triplet": (6.80032, 6.93161, 5.87978),
    "softmax+center": (2.17694, 1.85536, 1.56725),
    "npair": (29.1089, 1.11257, 35.0268),
    "histogram": (0.0936039, 0.0727942, 0.0458159),
    "focal": (1.46628, 1.18543, 0.92948),
    "multi_similarity": (1.01558, 1.01399, 0.919732),
    "sphereface_m1": (2.36873, 2.16964, 1.57216),
    "sphereface": (12.4504, 16.5053, 15.6601),
    "cosface": (12.6732, 12.4171, 11.6078),
    "arcface": (10.0584, 9.51152, 7.87878),
    "circle": (55.7389, 56.0617, 53.1402),
    "supcon": (3.25492, 3.20837, 3.07588),
    "weighted_triplet": (3.34008, 3.44004, 2.43652),
    "proxy_anchor": (13.0784, 12.4219, 11.0473),
    "smooth_ap": (0.196336, 0.172796, 0.125666),
    "subcenter_arcface": (33.6573, 32.8196, 32.1315),
    "adasp": (5.82262, 5.75754, 5.24587),
    "adaface": (29.268, 28.7124, 26.9749),
}


@pytest.mark.parametrize("row", ROWS)
def test_first_three_losses(flags, tmp_path, row):
    """Three epochs of one step each: 6 identities x 9 images are all that the set has."""
    words = ["--p", "6", "--k", "9", "--epochs", "3", "--milestones", "3", "--lr", "2e-5", "--save-every", "60"]
    train.main(["--loss", row, *flags, *words])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert row in PINNED, f'PINNED lacks "{row}": {losses}'
    assert losses == pytest.approx(PINNED[row], rel=5e-3)
