"""utils/features.py: what is saved comes back, from a file or a folder; what does not fit is refused in a sentence."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from utils.features import Features, load_features, path_cameras, save_features
from utils.ranking import rank_metrics


def features(**changes):
    rng = np.random.default_rng(0)
    return Features(
        query=rng.normal(size=(3, 4)).astype(np.float32),
        query_pids=np.array([1, 2, 2]),
        query_camids=np.array([1, 1, 2]),
        gallery=rng.normal(size=(5, 4)).astype(np.float32),
        gallery_pids=np.array([1, 2, -1, 0, 2]),
        gallery_camids=np.array([2, 1, 1, 3, 3]),
        query_paths=np.array(["q/1.jpg", "q/2.jpg", "q/ü.jpg"]),
        gallery_paths=np.array([f"g/{n}.jpg" for n in range(5)]),
    )._replace(**changes)


def metrics(f):
    return rank_metrics(f.query, f.query_pids, f.query_camids, f.gallery, f.gallery_pids, f.gallery_camids)


@pytest.mark.parametrize("name", ["features.npz", "deep/er/features.npz", "features", "a.b"])
@pytest.mark.parametrize("paths", [True, False])
def test_round_trip(tmp_path, name, paths):
    saved = features() if paths else features(query_paths=None, gallery_paths=None)
    target = save_features(tmp_path / name, saved)
    assert target == tmp_path / name
    loaded = load_features(str(target))
    for a, b in zip(saved, loaded, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and (a == b).all())
    assert [path.name for path in target.parent.iterdir()] == [target.name]  # no unfinished file
    assert isinstance(loaded.gallery, np.memmap) == target.is_dir()
    assert metrics(loaded) == metrics(saved)


def test_layout(tmp_path):
    """The names that anybody's own features must have: those of plain numpy files."""
    f = features()
    folder = save_features(tmp_path / "folder", f)
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.npy" for name in Features._fields)
    np.savez(tmp_path / "own.npz", **{name: array for name, array in f._asdict().items() if "paths" not in name})
    assert load_features(tmp_path / "own.npz").query_paths is None
    with np.load(save_features(tmp_path / "ours.npz", f), allow_pickle=False) as archive:
        assert sorted(archive.files) == sorted(Features._fields)


def test_tensors_lists_and_paths_are_taken(tmp_path):
    f = features(
        query=torch.randn(3, 4, requires_grad=True), query_pids=[1, 2, 2], gallery_camids=torch.tensor([2, 1, 1, 3, 3]),
        query_paths=[Path("q/1.jpg"), "q/2.jpg", "q/3.jpg"],
    )  # fmt: skip
    loaded = load_features(save_features(tmp_path / "f.npz", f))
    assert loaded.query_paths.tolist() == [str(Path("q/1.jpg")), "q/2.jpg", "q/3.jpg"]
    assert loaded.query_pids.tolist() == [1, 2, 2] and (loaded.query == f.query.detach().numpy()).all()
    loaded = load_features(save_features(tmp_path / "half.npz", f._replace(query=torch.ones(3, 4).bfloat16())))
    assert loaded.query.dtype == np.float32  # numpy has no bfloat16


@pytest.mark.parametrize("name", ["f.npz", "f"])
def test_without_cameras(tmp_path, capsys, name):
    """The paths alone will do where cameras are ignored; else a sentence says what to add."""
    ids = {"query_pids": np.array([1, 2]), "gallery_pids": np.array([1, 1, 2])}
    arrays = {"query": np.eye(2), "gallery": np.eye(2)[[0, 1, 1]], **ids}
    paths = {"query_paths": np.array(["a", "b"]), "gallery_paths": np.array(["a", "c", "d"])}
    without = Features(**arrays, query_camids=None, gallery_camids=None, **paths)
    file = save_features(tmp_path / name, without)
    assert load_features(file).query_camids is None
    evaluate.main(["--features", str(file), "--ignore-cameras", "--device", "cpu"])
    numbers = capsys.readouterr().out.split("\n")[2].split()[2:]
    # query a: its own picture is dropped, its match c is as near as the wrong d: rank 2; query b: d ties with c: rank 2
    assert numbers[0] == "0.00" and numbers[4] == "50.00" and numbers[-1] == "2"
    with pytest.raises(ValueError, match="hold no cameras: add query_camids and gallery_camids, or .* --ignore-cam"):
        evaluate.main(["--features", str(file), "--device", "cpu"])
    bare = save_features(tmp_path / f"bare{name}", without._replace(query_paths=None))
    with pytest.raises(ValueError, match="add query_paths and gallery_paths"):
        evaluate.main(["--features", str(bare), "--ignore-cameras", "--device", "cpu"])


def test_an_unknown_camera_is_said_if_it_counts(tmp_path, capsys):
    """That of a distractor (0) or of junk (-1) can't: their images are in nobody's own camera."""
    query, gallery = np.eye(2, dtype=np.float32), np.eye(4, 2, dtype=np.float32)
    arrays = {"query": query, "query_pids": [1, 2], "query_camids": [0, 0], "query_paths": ["a", "b"]}
    arrays |= {"gallery": gallery, "gallery_pids": [1, 2, 0, -1], "gallery_paths": ["c", "d", "e", "f"]}
    for name, camids in (("others.npz", [1, 1, -1, -1]), ("own.npz", [1, -1, 0, 0])):
        np.savez(tmp_path / name, gallery_camids=camids, **arrays)
        evaluate.main(["--features", str(tmp_path / name)])
        assert ("a camera is unknown (-1)" in capsys.readouterr().out) == (name == "own.npz")


@pytest.mark.parametrize("name", ["f.npz", "f"])
def test_what_exists_is_kept(tmp_path, name):
    save_features(tmp_path / name, features())
    with pytest.raises(ValueError, match="exists: delete it or choose another name"):
        save_features(tmp_path / name, features(query=np.zeros((3, 4))))
    assert (load_features(tmp_path / name).query == features().query).all()


@pytest.mark.parametrize("name", ["f.npz", "f"])
def test_an_interrupted_write_leaves_nothing_that_loads(tmp_path, name, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    for writer in ("save", "savez"):
        monkeypatch.setattr(np, writer, full)
    with pytest.raises(OSError, match="No space left"):
        save_features(tmp_path / name, features())
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="No features at"):
        load_features(tmp_path / name)
    save_features(tmp_path / name, features())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": np.zeros(3)}, r"query in .* numbers .* shape \(rows, D\), not float64 of shape \(3,\)"),
        ({"gallery": np.zeros((5, 6), np.float32)}, r"differ in width: query \(3, 4\), gallery \(5, 6\)"),
        ({"gallery": np.zeros((5, 4), complex)}, "gallery in .* must hold numbers"),
        ({"query_pids": np.array([1.0, 2, 2])}, r"query_pids in .* integers of shape \(3,\), not float64"),
        ({"gallery_camids": np.arange(4)}, r"gallery_camids in .* shape \(5,\), not int64 of shape \(4,\)"),
        ({"gallery_paths": ["a"] * 4}, r"gallery_paths in .* text of shape \(5,\)"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        save_features(tmp_path / "f.npz", features(**changes))
    assert not list(tmp_path.iterdir())
    arrays = {name: np.asarray(value) for name, value in features(**changes)._asdict().items()}
    np.savez(tmp_path / "foreign.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        load_features(tmp_path / "foreign.npz")


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="No features at .*nowhere"):
        load_features(tmp_path / "nowhere")

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty lacks query, query_pids, gallery, gallery_pids: features are"):
        load_features(tmp_path / "empty")

    folder = save_features(tmp_path / "folder", features())
    (folder / "gallery_pids.npy").unlink()
    with pytest.raises(ValueError, match="folder lacks gallery_pids"):
        load_features(folder)

    for name, content in (("text.npz", b"not an archive"), ("cut.npz", None), ("pickle.npz", pickle.dumps({"a": 1}))):
        whole = save_features(tmp_path / f"whole_{name}", features()).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(ValueError, match=f"Cannot read .*{name}"):
            load_features(tmp_path / name)

    np.save(tmp_path / "single.npz", np.zeros(3))
    (tmp_path / "single.npz.npy").rename(tmp_path / "single.npz")
    with pytest.raises(ValueError, match="single array"):
        load_features(tmp_path / "single.npz")

    truncated = save_features(tmp_path / "truncated", features()) / "gallery.npy"
    truncated.write_bytes(truncated.read_bytes()[:-8])
    with pytest.raises(ValueError, match="Cannot read .*gallery.npy"):
        load_features(tmp_path / "truncated")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("folder", [True, False])
def test_nothing_is_unpickled(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    arrays = {**features()._asdict(), "query_pids": np.array([Bomb(), 1, 2], dtype=object)}
    if folder:
        Path("f").mkdir()
        for name, array in arrays.items():
            np.save(f"f/{name}.npy", array, allow_pickle=True)
    else:
        np.savez("f.npz", **arrays)
    with pytest.raises(ValueError, match="Cannot read .*query_pids.*pickled objects are refused"):
        load_features("f" if folder else "f.npz")
    assert not Path("exploded").exists()


def test_path_cameras():
    """Equal paths share a camera, and no others: ranking then drops a query's own image alone."""
    query, gallery = path_cameras(["a", Path("b")], np.array(["b", "c", "a", "a"]))
    assert query.dtype == gallery.dtype == np.int64
    assert [[int(q == g) for g in gallery] for q in query] == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert len({*gallery}) == 3
    with pytest.raises(ValueError, match="needs the paths"):
        path_cameras(None, ["a"])
