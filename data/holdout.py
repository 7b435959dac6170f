"""A validation set made of training identities, so that choices need not look at the test set."""

import random

from data.records import Record, Split


def holdout(train: list[Record], seed: int, share: float = 1 / 3) -> Split:
    """Hold out a share of the training identities as query and gallery; the others stay the training set.

    Market-1501's protocol: of each held-out identity seen by two cameras or more, one image per camera is a query and
    the others are the gallery. An image stays in the gallery where a query would otherwise lose its last true match.
    Remaining identities are labelled 0..C-1 in the order of their pids; held-out records have label -1.
    The draw depends on the seed, the pids and the order of the paths; not on the order of `train`.
    Raises ValueError if fewer than two identities would be held out or left, or if none of them gives a query.
    """
    pids = sorted({r.pid for r in train})
    count = round(share * len(pids))
    if count < 2 or len(pids) - count < 2:
        raise ValueError(
            f"Holding out {share:.2f} of {len(pids)} training identities leaves fewer than two on one side: "
            "use a data set with more identities."
        )
    held_out = set(random.Random(f"holdout {seed}").sample(pids, count))

    kept, images = [], {}  # images: pid -> its records
    for record in sorted(train, key=lambda r: r.path):
        if record.pid in held_out:
            images.setdefault(record.pid, []).append(record._replace(label=-1))
        else:
            kept.append(record)
    labels = {pid: label for label, pid in enumerate(sorted({r.pid for r in kept}))}

    query, gallery = [], []
    for pid, records in images.items():
        rng = random.Random(f"holdout {seed} {pid}")  # its own: another identity more does not change this one's
        chosen, rest = [], records
        for camid in sorted({r.camid for r in records}):
            record = rng.choice([r for r in records if r.camid == camid])
            others = [r for r in rest if r is not record]
            cameras = {r.camid for r in others}
            if all(cameras - {r.camid} for r in [*chosen, record]):  # every query keeps a match in another camera
                chosen, rest = [*chosen, record], others
        query += chosen
        gallery += rest
    if not query:
        raise ValueError("No held-out identity was seen by two cameras, so there is nothing to search for.")
    return Split(
        [r._replace(label=labels[r.pid]) for r in kept],
        sorted(query, key=lambda r: r.path),
        sorted(gallery, key=lambda r: r.path),
    )
