"""A validation set made of training identities, so that choices need not look at the test set."""

import random

from data.records import Record, Split, add_labels, choose_queries


def holdout(train: list[Record], seed: int, share: float = 1 / 3, ignore_cameras: bool = False) -> Split:
    """Hold out a share of the training identities as query and gallery; the others stay the training set.

    Market-1501's protocol: of each held-out identity seen by two cameras or more, one image per camera is a query and
    the others are the gallery. An image stays in the gallery where a query would otherwise lose its last true match.
    ignore_cameras: an image by the same camera is a true match, too; so it is where cameras are unknown (camid -1).
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

    kept, people = [], {}  # people: pid -> its records
    for record in sorted(train, key=lambda r: r.path):
        if record.pid in held_out:
            people.setdefault(record.pid, []).append(record._replace(label=-1))
        else:
            kept.append(record)
    query, gallery = choose_queries(people, f"holdout {seed}", ignore_cameras)
    if not query:
        way_out = "" if ignore_cameras else " (--ignore-cameras counts two images by one camera)"
        raise ValueError(f"No held-out identity was seen by two cameras, so there is nothing to search for{way_out}.")
    return Split(add_labels(kept), query, gallery)
