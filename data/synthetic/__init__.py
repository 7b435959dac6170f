"""Generated pedestrians: a data set in Market-1501's layout, drawn on first use with numpy and Pillow.

    folder = generate("datasets", num_ids=150)  # datasets/synthetic-v2-150
    python -m data.synthetic --contact-sheet results/synthetic_contact_sheet.png

people.py says who there is, figures.py draws one of them, scenes.py holds six cameras and what is behind the people,
render.py makes one image; this file lists all images and writes the folder. Another seed gives other people and other
cameras, in a folder of its own. No person was photographed. What holds on these images is no claim about Market-1501.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import numpy as np
import PIL
from tqdm import tqdm

from data.synthetic.people import people
from data.synthetic.render import DISTRACTOR, JUNK, TEST, TRAIN, Task, render

VERSION = 2  # raised whenever a pixel changes, so that an older folder is never taken for the new one
FEW = 1000  # images, which one process draws sooner than several
FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
RECORDED = "Pillow 13.0.0, numpy 2.4.6, x86_64"  # what drew the images of the recorded results
DIGESTS = ("80df411bdd8a2f19", "4291bcccef9965b8")  # with AVX-512, and without: numpy's powers differ a little


def tasks(num_ids: int, seed: int) -> list[Task]:
    """Every image of the data set, in a fixed order and in Market-1501's proportions."""
    todo = []
    for stream in (TRAIN, TEST):
        for number, person in enumerate(people(num_ids, seed, stream)):
            pid = 2 * number + (2 if stream == TRAIN else 1)  # training pids are even, test pids odd
            rng = np.random.default_rng([seed, stream, pid, 0])
            count = rng.choice((2, 3, 4, 5, 6), p=(0.08, 0.14, 0.24, 0.29, 0.25))
            for camera in sorted((rng.permutation(6)[:count] + 1).tolist()):
                sequence, frame = int(rng.integers(1, 7)), int(rng.integers(1, 900))
                for index in range(1 + rng.poisson(2.84) + (stream == TEST)):
                    folder = FOLDERS[0] if stream == TRAIN else FOLDERS[2] if index else FOLDERS[1]
                    name = f"{pid:04d}_c{camera}s{sequence}_{frame * 25 + 25 * index:06d}_{rng.integers(0, 6):02d}.jpg"
                    todo.append(Task(f"{folder}/{name}", stream, pid, camera, index, person))
    group = people(num_ids, seed, TEST)
    rng = np.random.default_rng([seed, JUNK])
    for stream, pid, name, per_id in ((JUNK, -1, "-1", 5.09), (DISTRACTOR, 0, "0000", 3.73)):
        for index in range(round(per_id * num_ids)):
            camera, sequence = int(rng.integers(1, 7)), int(rng.integers(1, 7))
            path = f"{FOLDERS[2]}/{name}_c{camera}s{sequence}_{index * 25 + 1:06d}_{rng.integers(0, 6):02d}.jpg"
            person = group[rng.integers(num_ids)] if stream == JUNK else None
            todo.append(Task(path, stream, pid, camera, index, person))
    return todo


def versions() -> str:
    """What the pixels may depend on."""
    return f"Pillow {PIL.__version__}, numpy {np.__version__}, {platform.machine()}"


def digest(seed: int = 0) -> str:
    """Of the pixels of a third of the images of 10 + 10 people, before they become JPEG."""
    drawn = hashlib.sha256()
    for task in tasks(10, seed)[::3]:
        drawn.update(render(task, seed)[0].tobytes())
    return drawn.hexdigest()[:16]


def generate(data_dir: str | Path, num_ids: int = 150, seed: int = 0, workers: int | None = None) -> Path:
    """The folder of the data set with num_ids people in training and as many in test; drawn if it is not there yet.

    It is drawn under a temporary name and renamed when it is whole, so a folder of this name is always complete.
    seed: another one gives other people and other cameras.
    workers: processes that draw, by default one for each core that this process may use; no pixel depends on it.
    Raises ValueError for a number of people below 2 or a negative seed, OSError if a file could not be written. Warns
    if Pillow and numpy draw other pixels here than those that the recorded results were computed from.
    """
    if num_ids < 2 or num_ids != int(num_ids):
        raise ValueError(f"the number of generated identities must be a whole number of at least 2, not {num_ids}")
    if seed < 0 or seed != int(seed):
        raise ValueError(f"the seed of the generated pedestrians must be a whole number of at least 0, not {seed}")
    data_dir, num_ids, seed = Path(data_dir), int(num_ids), int(seed)
    name = f"synthetic-v{VERSION}-{num_ids}" + (f"-seed{seed}" if seed else "")
    folder = data_dir / name
    if folder.is_dir():
        return folder
    if digest() not in DIGESTS:
        text = f"some pixels of the generated pedestrians differ from those of the recorded results ({RECORDED})"
        warnings.warn(f"{text}, and so will numbers: this is {versions()}", stacklevel=2)
    data_dir.mkdir(parents=True, exist_ok=True)
    for leftover in data_dir.glob(f".{name}.*"):  # of a killed attempt; one that still grows belongs to another process
        newest = max((path.stat().st_mtime for path in (leftover, *leftover.glob("*"))), default=0.0)
        if time.time() - newest > 3600:
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = data_dir / f".{name}.{uuid.uuid4().hex}"
    try:
        for part in FOLDERS:
            (temporary / part).mkdir(parents=True)
        draw_all(temporary, num_ids, seed, workers)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same pixels
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def draw_all(folder: Path, num_ids: int, seed: int, workers: int | None):
    """Draw every image into folder, in this process for a tiny set, else in several that import nothing but `data`.

    Plain subprocesses rather than multiprocessing: nothing is forked after torch was imported, and the caller's
    script is not imported again. All of them write one byte per image into one pipe; it closes with the last of them.
    """
    todo = tasks(num_ids, seed)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or (1 if len(todo) < FEW else cores)
    with tqdm(total=len(todo), desc=f"drawing {num_ids} + {num_ids} people", unit="image", disable=None) as bar:
        if workers == 1:
            for _ in draw_tasks(todo, folder, seed):
                bar.update()
            return
        read_end, write_end = os.pipe()
        root = Path(__file__).resolve().parents[2]
        shares = [(str(folder.resolve()), num_ids, seed, workers, number) for number in range(workers)]
        commands = [[sys.executable, "-c", f"from data.synthetic import draw_share; draw_share{s}"] for s in shares]
        processes = [subprocess.Popen(command, stdout=write_end, cwd=root) for command in commands]
        os.close(write_end)
        try:
            with open(read_end, "rb", buffering=0) as progress:
                while done := progress.read(4096):
                    bar.update(len(done))
            if any(process.wait() for process in processes):
                raise OSError(f"the generated pedestrians could not be drawn in {folder.parent}: see the message above")
        finally:
            for process in processes:
                process.kill()
                process.wait()


def draw_tasks(todo: list[Task], folder: Path, seed: int):
    """Draw and save; yields after every image."""
    for task in todo:
        image, quality = render(task, seed)
        image.save(folder / task.path, quality=quality)
        yield task


def draw_share(folder: str, num_ids: int, seed: int, workers: int, number: int):
    """Draws every workers-th image, in a process of its own; writes one byte per image."""
    try:
        for _ in draw_tasks(tasks(num_ids, seed)[number::workers], Path(folder), seed):
            os.write(1, b".")
    except (BrokenPipeError, KeyboardInterrupt):  # nobody waits for the images any more
        pass
    except OSError as error:  # a full disk, say
        sys.exit(str(error))
