"""CUHK03 by the new protocol: 767 people for training, 700 for the test, each seen by two cameras.

Li et al., "DeepReID: Deep Filter Pairing Neural Network for Person Re-Identification", CVPR 2014; the protocol: Zhong
et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017. Two sets of boxes, `detected` and
`labeled` (drawn by hand), with other numbers: each result says which.

Two sources. The folders of CUHK03-NP: cuhk03-np/{detected,labeled}/{bounding_box_train,query,bounding_box_test}, names
such as 0003_c1_21.png: identity 3, camera 1 (1 or 2). Or the authors' cuhk-03.mat (MATLAB v7.3, read by h5py) with
cuhk03_new_protocol_config_{detected,labeled}.mat: its images are written once as such folders, to cuhk03-np beside it.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Annotated, Literal

from data.records import Report, Split, add_labels, compare_counts, find_folder, read_folder, stop

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
MAT_PLACES = ("cuhk03/cuhk03_release", "cuhk03", "cuhk03_release", ".")  # below the root
PLACES = ("cuhk03-np", *(f"{place}/cuhk03-np" for place in MAT_PLACES), ".")  # and in them the boxes
NAME = re.compile(r"([0-9]{1,18})_c([0-9])_")  # identity, camera; 18 digits fit an int64
EXAMPLE = "0003_c1_21.png"
CAMERAS = range(1, 3)
COUNTS = {  # identities, images
    "detected": {"train": (767, 7365), "query": (700, 1400), "gallery": (700, 5332)},
    "labeled": {"train": (767, 7368), "query": (700, 1400), "gallery": (700, 5328)},
}


def cuhk03(
    root: str | Path,
    check_counts: bool = True,
    report: Report = stop,
    *,
    cuhk03_boxes: Annotated[Literal["detected", "labeled"], "boxes by a detector or by hand"] = "detected",
) -> Split:
    """Read the file names of CUHK03-NP, after writing its folders from cuhk-03.mat if only that is there.

    root: the folder that holds cuhk03-np/ or cuhk03/, or a folder further in.
    Warns if the counts are not those of a complete copy, unless check_counts is False.
    Raises FileNotFoundError if nothing is there or a folder is missing, ValueError if a file cannot be parsed or if
    h5py is needed and not installed.
    """
    folders = [f"{place}/{cuhk03_boxes}" for place in PLACES]
    mats = [Path(root) / place / "cuhk-03.mat" for place in MAT_PLACES]
    mat = next((path for path in mats if path.is_file()), None)
    if mat and not any((Path(root) / folder).is_dir() for folder in folders):
        extract(mat, cuhk03_boxes)
    folder = find_folder(root, folders, [*FOLDERS.values()], report)
    train, query, gallery = (read_folder(folder / name, NAME, EXAMPLE, report) for name in FOLDERS.values())
    split = Split(add_labels(train), query, gallery)
    if check_counts:
        compare_counts(f"CUHK03 {cuhk03_boxes}", folder, split, COUNTS[cuhk03_boxes], CAMERAS, report)
    return split


def extract(mat: Path, boxes: str) -> None:
    """Write the images of cuhk-03.mat as PNG files, in the folders and names of CUHK03-NP, beside it.

    They are written under a temporary name that is changed when all are there. The names keep the authors' names:
    0003_c1_1_003_1_01.png is 1_003_1_01 (camera pair, person, view, image; all from 1) of identity 3 of the protocol.
    """
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{mat} is read by h5py: pip install h5py (or use the folders of CUHK03-NP)") from None
    from PIL import Image
    from scipy.io import loadmat
    from tqdm import tqdm

    config = f"cuhk03_new_protocol_config_{boxes}.mat"
    config = next((place / config for place in (mat.parent, mat.parent.parent) if (place / config).is_file()), None)
    if not config:
        raise FileNotFoundError(f"{mat.parent} has no cuhk03_new_protocol_config_{boxes}.mat: copy the protocol there.")
    try:
        protocol = loadmat(config)
        names = [Path(str(cell[0])).stem for cell in protocol["filelist"].flatten()]
        pids = protocol["labels"].flatten()
        todo = [(name, i - 1) for part, name in FOLDERS.items() for i in protocol[f"{part}_idx"].flatten()]
        source = h5py.File(mat, "r")
        pairs = [source[reference] for reference in source[boxes][0]]  # of cameras; each (10 images, people) references
    except (OSError, KeyError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{mat} or {config.name} is not the authors' file ({error}): copy it again.") from None

    folder = mat.parent / "cuhk03-np" / boxes
    temporary = folder.with_name(f".{boxes}.{os.getpid()}")
    try:
        for name in FOLDERS.values():
            (temporary / name).mkdir(parents=True)
        for name, i in tqdm(todo, f"writing {folder}", unit="image", leave=False, disable=None):
            pair, person, view, image = map(int, names[i].split("_"))
            pixels = source[pairs[pair - 1][image - 1, person - 1]][()].T  # MATLAB's (H, W, 3) is read as (3, W, H)
            file = temporary / name / f"{pids[i]:04d}_c{view}_{names[i]}.png"
            Image.fromarray(pixels).save(file, compress_level=1)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same pixels
                raise
    finally:
        source.close()
        shutil.rmtree(temporary, ignore_errors=True)
