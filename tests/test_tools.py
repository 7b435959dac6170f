"""tools/: each one run on a tiny trained network, and what it wrote looked at; the page of tools.show in a browser."""

import ast
import base64
import csv
import importlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import small_models
from PIL import Image

import train
from data.images import normalise, stream_images
from evaluate import load_run
from models import build_model
from tools import compare, embed, embedding, export, search, show
from utils.errors import UserError
from utils.ranking import rank_queries
from utils.verification import Pairs

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.usefixtures("small_network"), pytest.mark.filterwarnings("ignore:Market-1501 in")]
CPU = ["--device", "cpu", "--workers", "1"]


@pytest.fixture(scope="module")
def runs(tiny_market, tmp_path_factory):
    """Two finished runs, one of them with a name that HTML must not take for its own."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--dataset", "market", "--data-dir", str(tiny_market), "--arch", "resnet18", "--weights",
             "none", "--p", "4", "--height", "32", "--width", "16", "--epochs", "1", *CPU]  # fmt: skip
    with small_models():
        for name, loss in (("one <b>", "softmax"), ("two", "triplet")):
            train.main(["--loss", loss, *flags, "--run-dir", str(folder / name)])
    return [folder / "one <b>", folder / "two"]


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the first run, without anything that a tool kept."""
    return Path(shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("embeddings", "show*")))


def wanted(run, paths):
    """Embeddings as the network gives them, one image after the other."""
    model, args = load_run(run, torch.device("cpu"))
    images = stream_images(list(paths), args["height"], args["width"], torch.device("cpu"), 1, 0)
    with torch.inference_mode():
        return torch.cat([model(image) for image in images]).numpy()


# ------------------------------------------------------------------------------------------------------------ embedding


def test_embed_a_folder_and_a_csv_file(run, tiny_market, tmp_path, capsys):
    embed.main([str(tiny_market / "query"), str(tmp_path / "out.npz"), "--run", str(run), *CPU])
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        assert out["paths"].tolist() == sorted(map(str, (tiny_market / "query").glob("*.png")))
        np.testing.assert_allclose(out["embeddings"], wanted(run, map(Path, out["paths"])), atol=1e-5)
        whole = out["embeddings"]
    rows = [("who", "path"), *(("x", f"query/{path.name}") for path in sorted((tiny_market / "query").iterdir())[3:5])]
    with (tiny_market / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    embed.main([str(tiny_market / "list.csv"), str(tmp_path / "some.npz"), "--run", str(run), *CPU])
    assert (np.load(tmp_path / "some.npz")["embeddings"] == whole[3:5]).all()
    assert "2 of 2 embeddings were kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="out.npz exists"):
        embed.main([str(tiny_market / "query"), str(tmp_path / "out.npz"), "--run", str(run), *CPU])


def test_only_new_and_changed_images_are_embedded(run, tiny_market, tmp_path, monkeypatch):
    photos, asked = tmp_path / "photos", []
    photos.mkdir()
    for path in (tiny_market / "query").iterdir():
        Image.open(path).save(photos / f"{path.stem}.bmp")  # all of one size
    paths = sorted(photos.iterdir())
    opened = embedding.open_run(run, "cpu", 1)
    real = embedding.embed_paths
    monkeypatch.setattr(embedding, "embed_paths", lambda run, new, *a: asked.append(list(new)) or real(run, new, *a))
    monkeypatch.setattr(embedding, "CHUNK", 5)
    first = embedding.embed_kept(opened, paths)[:]
    assert [path for chunk in asked for path in chunk] == paths and max(map(len, asked)) == 5
    shutil.copy(paths[1], paths[0])
    os.utime(paths[0], ns=(1, 1))  # another time of change, the same size
    paths[2].rename(photos / "new.bmp")
    asked.clear()
    again = embedding.embed_kept(opened, sorted(photos.iterdir(), reverse=True))
    assert asked == [[photos / "new.bmp", paths[0]]]
    found = dict(zip(again.paths, again[:], strict=True))
    assert (found[paths[0]] == first[1]).all() and (found[photos / "new.bmp"] == first[2]).all()
    assert all((found[path] == row).all() for path, row in list(zip(paths, first, strict=True))[3:])


def test_a_file_that_changes_meanwhile_is_embedded_again(run, tiny_market, tmp_path, monkeypatch):
    """What was embedded counts for the file as it was listed."""
    paths = [Path(shutil.copy(path, tmp_path)) for path in sorted((tiny_market / "query").iterdir())[:3]]
    opened, real = embedding.open_run(run, "cpu", 1), embedding.embed_paths

    def and_then_it_changes(*arguments):
        rows = real(*arguments)
        shutil.copy(paths[1], paths[0])
        os.utime(paths[0], ns=(1, 1))
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "embed_paths", and_then_it_changes)
        before = embedding.embed_kept(opened, paths)[:]
    after = embedding.embed_kept(opened, paths)[:]
    assert (before[1:] == after[1:]).all() and (after[0] == after[1]).all() and (before[0] != before[1]).any()


def test_kept_embeddings_belong_to_the_network_that_was_read(runs, run, tiny_market):
    """Though a training saves its next epoch meanwhile, and mirrored images to another flag."""
    paths, opened = sorted((tiny_market / "query").iterdir()), embedding.open_run(run, "cpu", 1)
    shutil.copy(runs[1] / "last.pt", run / "last.pt")
    embedding.embed_kept(opened, paths)
    for name in ("last.pt", "args.json"):
        shutil.copy(runs[1] / name, run / name)
    plain = embedding.embed_kept(embedding.open_run(run, "cpu", 1), paths)[:]
    np.testing.assert_allclose(plain, wanted(run, paths), atol=1e-5)
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**args, "flip_test": True}))
    assert not np.allclose(embedding.embed_kept(embedding.open_run(run, "cpu", 1), paths)[:], plain)


def test_a_file_by_two_spellings_is_one(run, tiny_market):
    """Both new at once: the rows of the files after it stay theirs."""
    first, second, third = sorted((tiny_market / "query").iterdir())[:3]
    paths = [first, first.parent / ".." / "query" / first.name, second, third]
    opened = embedding.open_run(run, "cpu", 1)
    expected = embedding.embed_paths(opened, [first, first, second, third])
    assert (embedding.embed_kept(opened, paths)[:] == expected).all()


def test_a_stopped_tool_keeps_what_it_has_embedded(run, tiny_market, monkeypatch):
    """Killed between rows and lines, within a line, or within a row: what is whole is used, the rest made anew."""
    paths, opened = sorted((tiny_market / "query").iterdir()), embedding.open_run(run, "cpu", 1)
    whole = embedding.embed_kept(opened, paths)[:]
    (lines,), (rows,) = ((run / "embeddings").glob(end) for end in ("*.jsonl", "*.f32"))
    text, numbers = lines.read_bytes(), rows.read_bytes()
    t, n = len(text), len(numbers)
    for kept_text, kept_rows in ((t - 9, n), (t, n - 6), (0, n), (7, 0)):
        lines.write_bytes(text[:kept_text])
        rows.write_bytes(numbers[:kept_rows])
        assert (embedding.embed_kept(opened, paths)[:] == whole).all()
        assert rows.stat().st_size == len(numbers)


def test_another_checkpoint_is_embedded_anew(runs, run, tiny_market):
    paths = sorted((tiny_market / "query").iterdir())
    before = embedding.embed_kept(embedding.open_run(run, "cpu", 1), paths)[:]
    for name in ("last.pt", "args.json"):
        shutil.copy(runs[1] / name, run / name)
    after = embedding.embed_kept(embedding.open_run(run, "cpu", 1), paths)[:]
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after, wanted(run, paths), atol=1e-5)
    assert len(list((run / "embeddings").glob("*.f32"))) == 1


def test_bad_images_stop_or_are_left_out(run, tiny_market, tmp_path, capsys):
    photos = Path(shutil.copytree(tiny_market / "query", tmp_path / "photos"))
    (photos / "0000_bad.jpg").write_bytes(b"no picture")
    (photos / "notes.txt").write_text("x")
    flags = [str(photos), str(tmp_path / "out.npz"), "--run", str(run), *CPU]
    with pytest.raises(UserError, match="0000_bad.jpg can't be read as an image"):
        embed.main(flags)
    embed.main([*flags, "--skip-bad-images"])
    out = capsys.readouterr().out
    assert "left out: " in out and "0000_bad.jpg" in out and "1 file of type .txt" in out
    found = np.load(tmp_path / "out.npz")
    assert len(found["paths"]) == 18 and str(photos / "0000_bad.jpg") not in found["paths"]
    np.testing.assert_allclose(found["embeddings"], wanted(run, map(Path, found["paths"])), atol=1e-5)


@pytest.mark.parametrize("name, sentence", [("none", "does not exist"), ("empty", "holds no images"),
                                            ("no.csv", "no column path"), ("lost.csv", "but stands in"),
                                            ("open.csv", "a quotation mark not closed"),
                                            ("loop", "is a link to a folder that it lies in")])  # fmt: skip
def test_images_that_are_not_there(tmp_path, name, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.csv").write_text("file,pid\na.jpg,1\n")
    (tmp_path / "lost.csv").write_text("path;pid\na.jpg;1\n")
    (tmp_path / "open.csv").write_text('path,pid\n"a.jpg,1\n' + 20_000 * "b.jpg,1\n")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/again").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=sentence):
        embedding.find_images(tmp_path / name)


# --------------------------------------------------------------------------------------------------------------- search


def table_rows(out):
    """Of a printed table: (similarity, path) of each line that begins with a rank."""
    return [(float(s), path) for s, path in re.findall(r"^ *\d+ +(-?\d\.\d+) +(\S+)$", out, flags=re.M)]


def test_search_finds_what_a_sort_finds(run, tiny_market, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 7)
    query, gallery = sorted((tiny_market / "query").iterdir())[4], tiny_market / "bounding_box_test"
    flags = ["--query", str(query), "--gallery", str(gallery), "--top", "5", "--out", str(tmp_path / "s.png")]
    search.main([*flags, "--run", str(run), *CPU])
    paths = sorted(gallery.iterdir())
    rows = wanted(run, [query, *paths])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows[1:] @ rows[0]
    found = table_rows(capsys.readouterr().out)
    assert [path for _, path in found] == [str(paths[i]) for i in np.argsort(-similarity)[:5]]
    assert [s for s, _ in found] == pytest.approx(sorted(similarity, reverse=True)[:5], abs=6e-4)
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.format == "PNG" and picture.width > 6 * 80
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels != 255).any(2).mean() > 0.3


def test_search_leaves_the_query_itself_out_and_takes_several(run, tiny_market, tmp_path, capsys):
    one, two = sorted((tiny_market / "query").iterdir())[:2]
    flags = ["--gallery", str(tiny_market / "query"), "--top", "99", "--out", str(tmp_path / "s.png")]
    search.main(["--query", str(one), str(two), *flags, "--run", str(run), *CPU])
    out = capsys.readouterr().out
    found = table_rows(out)
    assert len(found) == 2 * 17 and [path for _, path in found].count(str(one)) == 1
    assert "0 of 18 embeddings were kept" in out
    search.main(["--query", str(one), *flags, "--run", str(run), *CPU])
    assert "18 of 18 embeddings were kept" in capsys.readouterr().out
    twice = tmp_path / "twice"
    shutil.copytree(tiny_market / "query", twice / "all")
    (twice / "favourites").symlink_to(twice / "all")  # a folder by two names: found by neither of them
    flags = ["--gallery", str(twice), "--top", "99", "--out", str(tmp_path / "new/s.png")]
    search.main(["--query", str(twice / "all" / one.name), *flags, "--run", str(run), *CPU])
    found = table_rows(capsys.readouterr().out)
    assert len(found) == 2 * 17 and one.name not in {Path(path).name for _, path in found}
    assert (tmp_path / "new/s.png").is_file()


# -------------------------------------------------------------------------------------------------------------- compare


def test_compare(run, tiny_market, capsys):
    a, b = sorted((tiny_market / "query").iterdir())[:2]
    compare.main([str(a), str(b), "--run", str(run), "--false-match-rate", "0.05", *CPU])
    out = capsys.readouterr().out
    rows = wanted(run, [a, b])
    similarity = rows[0] @ rows[1] / np.prod(np.linalg.norm(rows, axis=1))
    assert f"similarity {similarity:.4f}" in out and "people of the test set of market" in out
    threshold = float(re.search(r"threshold (-?\d\.\d+) takes at most 5 %", out)[1])
    assert ("-> one person" in out) == (similarity >= threshold)
    with pytest.raises(SystemExit):
        compare.main([str(tiny_market / "query"), str(b), "--run", str(run), *CPU])
    assert "two pictures are compared, not 19" in capsys.readouterr().err
    compare.main([str(a), str(a), "--run", str(run), *CPU])
    out = capsys.readouterr().out
    assert "similarity 1.0000" in out and "-> one person" in out and "too few to speak of a rate of 0.001" in out


def test_compare_says_where_a_similarity_lies():
    """Ten bins of 0.1; of one person 1 pair at 0.25, 3 at 0.85; of two people 8 at 0.05, 1 at 0.35, 1 at 0.75."""
    positive, negative = torch.zeros(2, 10, dtype=torch.int64)
    positive[[2, 8]] = torch.tensor([1, 3])
    negative[[0, 3, 7]] = torch.tensor([8, 1, 1])
    words = compare.describe(0.5, Pairs(0.0, 0.1, positive, negative), 0.1, "of the test")
    assert "of 4 pairs of one person 25.00% are less alike" in words
    assert "of 10 pairs of two people 10.00% are as alike or more" in words
    assert "threshold 0.4000 takes at most 10 %" in words and "(here 1) and finds 75.0%" in words
    assert "-> one person" in words and "too few" not in words
    assert "-> two people" in compare.describe(0.5, Pairs(0.0, 0.1, positive, negative), 0.01, "")


# --------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("floats", [False, True])
def test_export_gives_the_embeddings_without_this_project(run, tiny_market, tmp_path, floats):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export.main([str(tmp_path / "m.onnx"), "--run", str(run), *(["--floats"] if floats else [])])
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    says = session.get_modelmeta().custom_metadata_map
    size = json.loads(says["width"]), json.loads(says["height"])
    paths = sorted((tiny_market / "query").iterdir())[:3]
    pictures = np.stack([np.asarray(Image.open(path).resize(size, Image.Resampling.BILINEAR)) for path in paths])
    if floats:
        pictures = (pictures / 255 - json.loads(says["mean"])) / json.loads(says["std"])
        pictures = pictures.astype(np.float32).transpose(0, 3, 1, 2)
    for batch in (pictures, pictures[:1]):
        (found,) = session.run(["embedding"], {"pictures": batch})
        np.testing.assert_allclose(found, wanted(run, paths[: len(batch)]), atol=1e-4)
    assert (says["arch"], says["loss"], says["run"], says["epoch"]) == ("resnet18", "softmax", "run", "1")
    assert (says["metric"], says["flip_test"]) == ("cosine", "false")
    with pytest.raises(UserError, match="exists"):
        export.main([str(tmp_path / "m.onnx"), "--run", str(run)])


def test_export_says_that_a_mirror_image_belongs_to_it(run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(args | {"flip_test": True}))
    export.main([str(tmp_path / "m.onnx"), "--run", str(run)])
    assert "scored with --flip-test: the mean of two embeddings" in capsys.readouterr().out


def test_export_refuses_what_differs_from_torch(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "STD", (0.3, 0.3, 0.3))
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "to_onnx", lambda run, floats, real=export.to_onnx: (
        real(run, floats)[0], export.FromPictures(run.model).half().float().apply(
            lambda m: m.weight.data.mul_(1.01) if hasattr(m, "weight") else None)))  # fmt: skip
    with pytest.raises(UserError, match="nothing written"):
        export.main([str(tmp_path / "m.onnx"), "--run", str(run)])
    assert not (tmp_path / "m.onnx").exists()


def test_export_without_its_packages_is_one_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        export.main([str(tmp_path / "m.onnx"), "--run", str(run)])


def test_pictures_are_normalised_as_in_training():
    pictures = torch.randint(0, 256, (2, 4, 3, 3), dtype=torch.uint8)
    torch.testing.assert_close(export.FromPictures(torch.nn.Identity())(pictures), normalise(pictures))


# ----------------------------------------------------------------------------------------------------------------- show


def page_data(page):
    """What the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), flags=re.S)
    return json.loads(text)


@pytest.fixture(scope="module")
def pages(runs):
    """Pages of one run and of both."""
    with small_models():
        for names, out in ((runs[:1], "one.html"), (runs, "both.html")):
            show.main(["--run", *map(str, names), "--out", str(runs[0].parent / out), "--png", *CPU])
    return runs[0].parent


def features_of(run):
    opened = embedding.open_run(run, "cpu", 1)
    tests, _, _ = show.load_tests(run, opened.args)
    return embedding.split_features(opened, next(iter(tests.values())))


def test_the_page_holds_what_was_found(runs, pages):
    data, f = page_data(pages / "one.html"), features_of(runs[0])
    ids = f.query_pids, f.query_camids, f.gallery, f.gallery_pids, f.gallery_camids
    results = rank_queries(f.query, *ids)
    assert len(data["queries"]) == 18 and len({query["image"] for query in data["queries"]}) == 18
    rows = torch.nn.functional.normalize(f.query), torch.nn.functional.normalize(f.gallery)
    base = Path(f.query_paths[0]).parent.parent
    names = [[str(Path(path).relative_to(base)) for path in paths] for paths in (f.query_paths, f.gallery_paths)]
    for query in data["queries"]:
        image = data["images"][query["image"]]
        q = names[0].index(image["path"])
        assert (image["pid"], image["camid"]) == (f.query_pids[q], f.query_camids[q])
        (found,) = query["found"]
        assert found["first"] == results["first_rank"][q] and query["matches"] == results["num_matches"][q]
        assert found["ap"] == pytest.approx(results["ap"][q].item(), abs=1e-5)
        similarity = rows[1] @ rows[0][q]
        similarity[(f.gallery_pids == f.query_pids[q]) & (f.gallery_camids == f.query_camids[q])] = -2
        order = similarity.argsort(descending=True)[:10].tolist()
        assert [data["images"][i]["path"] for i, _, _ in found["near"]] == [names[1][i] for i in order]
        assert [s for _, s, _ in found["near"]] == pytest.approx(similarity[order].tolist(), abs=1e-4)
        assert [right for _, _, right in found["near"]] == [bool(f.gallery_pids[i] == f.query_pids[q]) for i in order]
        assert (found["first"] > 1) == (not found["near"][0][2])
    source = base64.b64decode(data["images"][0]["source"])
    with Image.open(io.BytesIO(source)) as picture:
        assert picture.format == "JPEG" and picture.size == (80, 160)


def test_the_page_needs_nothing_else(pages):
    for name in ("one.html", "both.html"):
        page = (pages / name).read_text()
        assert not re.findall(r"""(?:src|href)=["']|https?://|@import|url\(""", page)
        assert "one &lt;b&gt;" in page and "one <b>" not in page and "{{" not in page


def test_names_of_files_and_runs_are_text(runs, pages, tmp_path):
    """Whatever they hold, even what closes a script or is no Unicode."""
    data = page_data(pages / "one.html")
    data["images"][0]["path"] = "</script><b>{{data}}\udcff"
    opened = embedding.open_run(runs[0], "cpu", 1)
    shown = show.look(opened, features_of(runs[0]))
    (tmp_path / "p.html").write_text(show.write_page([shown], "<i>", data))
    assert page_data(tmp_path / "p.html")["images"][0]["path"] == "</script><b>{{data}}\udcff"
    assert "&lt;i&gt;" in (tmp_path / "p.html").read_text()


def test_which_queries_are_chosen():
    ap = torch.tensor([0.9, 0.1, 0.5, 0.0, 0.3, 0.7, 0.2, 1.0])
    valid = torch.tensor([True] * 3 + [False] + [True] * 4)
    assert show.choose([ap], valid, 4) == [1, 6, 2, 7]  # two hardest; 0.5 and 1.0 of 0.3 0.5 0.7 0.9 1.0
    assert sorted(show.choose([ap], valid, 99)) == [0, 1, 2, 4, 5, 6, 7]
    other = torch.tensor([0.8, 0.9, 0.5, 1.0, 0.3, 0.3, 0.2, 1.0])
    assert show.choose([ap, other], valid, 2) == [1, 5]


def test_a_page_that_would_be_too_large_shows_fewer_queries(runs):
    shown = show.look(embedding.open_run(runs[0], "cpu", 1), features_of(runs[0]))
    whole, files = show.collect([shown], list(range(18)))
    half = sum(len(image["source"]) for image in whole["images"]) // 2
    less, _ = show.collect([shown], list(range(18)), most_bytes=half)
    assert len(files) == len(whole["images"]) and all(Path(file).is_file() for file in files)
    assert 0 < len(less["queries"]) < 18 and less["queries"] == whole["queries"][: len(less["queries"])]
    assert len(less["images"]) < len(whole["images"])


def maps_of(model, tiny_market, height, width):
    settings = {"height": height, "width": width, "amp": False, "device": torch.device("cpu"), "workers": 0}
    paths = sorted(map(str, (tiny_market / "query").iterdir()))[:2]
    maps = show.activation_maps(embedding.Run(Path("x"), model, {}, settings), paths)
    (images,) = stream_images([Path(path) for path in paths], height, width, torch.device("cpu"), 2, 0)
    return maps, images


def stretched(lengths):
    lengths = lengths - lengths.amin((1, 2), keepdim=True)
    return 255 * lengths / lengths.amax((1, 2), keepdim=True)


@pytest.mark.parametrize("arch, last", [("resnet18", "layer4"), ("mobilenet_v2", "features"), ("swin_t", "permute"),
                                        ("regnet_y_400mf", "trunk_output"), ("resnet18 gem", "layer4")])  # fmt: skip
def test_activation_maps(arch, last, tiny_market):
    """The length of the feature map's vectors; averaging the map gives the embedding, but for GeM."""
    model = build_model(arch.split()[0], pool="gem" if "gem" in arch else "avg").eval()
    maps, images = maps_of(model, tiny_market, 64, 32)
    found = []
    model.get_submodule(last).register_forward_hook(lambda *hook: found.append(hook[2]))
    with torch.inference_mode():
        embeddings = model(images)
    if "gem" not in arch:
        torch.testing.assert_close(found[0].mean((2, 3)), embeddings)
    assert maps.dtype == np.uint8
    np.testing.assert_allclose(maps, stretched(found[0].square().sum(1).sqrt()), atol=0.51)


def test_activation_maps_of_a_vision_transformer(tiny_market, monkeypatch):
    """A small one. At each place the length of the last token there, the class token's left out."""
    small = torchvision.models.VisionTransformer(224, 16, 2, 4, 64, 128)
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: small)
    model = build_model("vit_b_16", height=64, width=32).eval()
    with torch.no_grad():
        model.encoder.ln.weight.uniform_(0.5, 2)  # as it is made, it gives all tokens one length
    maps, images = maps_of(model, tiny_market, 64, 32)
    found = []
    model.encoder.register_forward_hook(lambda *hook: found.append(hook[2]))
    with torch.inference_mode():
        torch.testing.assert_close(model(images), found[0][:, 0])
    lengths = found[0][:, 1:].square().sum(2).sqrt().view(2, 4, 2)
    np.testing.assert_allclose(maps, stretched(lengths), atol=0.51)


def test_two_runs_of_different_tests_are_refused(runs, tmp_path, tiny_market):
    other = Path(shutil.copytree(tiny_market, tmp_path / "market"))
    sorted((other / "query").iterdir())[0].unlink()
    second = Path(shutil.copytree(runs[1], tmp_path / "second"))
    args = json.loads((second / "args.json").read_text())
    (second / "args.json").write_text(json.dumps({**args, "data_dir": str(other)}))
    with pytest.raises(UserError, match="tested on different images"):
        show.main(["--run", str(runs[0]), str(second), "--out", str(tmp_path / "x.html"), *CPU])


@pytest.mark.parametrize("tool", ["show", "compare"])
def test_a_test_set_without_true_matches(run, tiny_market, tmp_path, monkeypatch, tool):
    """The cause is said before anything is embedded."""
    other = Path(shutil.copytree(tiny_market, tmp_path / "market"))
    for path in (other / "bounding_box_test").iterdir():
        path.rename(path.with_name(f"9{path.name}"))
    monkeypatch.setattr(embedding, "embed", lambda *_, **__: pytest.fail("images were embedded"))
    flags = [] if tool == "show" else [str(path) for path in sorted((other / "query").iterdir())[:2]]
    with pytest.raises(UserError, match="none of the 6 people of the queries is in the gallery"):
        {"show": show, "compare": compare}[tool].main([*flags, "--run", str(run), "--data-dir", str(other), *CPU])


@pytest.mark.parametrize("name", ["one", "one_maps", "both"])
def test_the_png_has_frames_of_both_kinds(pages, name):
    with Image.open(pages / f"{name}.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ((0x1B, 0x78, 0x37), (0xC5, 0x1B, 0x29)):
        assert (pixels == colour).all(1).sum() > 1000


def test_png_without_matplotlib(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    show.main(["--run", str(runs[0]), "--out", str(tmp_path / "p.html"), "--png", "--queries", "3", *CPU])
    assert "pip install matplotlib" in capsys.readouterr().out and (tmp_path / "p.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------------- in the browser

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")


def browse(page, tmp_path, state="", script=""):
    """The page with this state in its address, and a script more, in headless Chromium -> its DOM, console lines."""
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
               "--virtual-time-budget=5000", "--dump-dom", f"{copy.as_uri()}{state}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def listed(dom):
    """The queries on the page in their order, as numbers of images, and what the counter says."""
    return [int(n) for n in re.findall(r'<article data-image="(\d+)"', dom)], re.search(r"<output.*?>(.*?)</", dom)[1]


def ap(query):
    return sum(found["ap"] for found in query["found"]) / len(query["found"])


@needs_chromium
def test_the_page_in_a_browser(pages, tmp_path):
    data = page_data(pages / "one.html")
    dom, console = browse(pages / "one.html", tmp_path)
    order = sorted(data["queries"], key=ap)
    assert console == [] and listed(dom) == ([query["image"] for query in order], "18 of 18 queries")
    article = re.search(r"<article.*?</article>", dom, flags=re.S)[0]
    near = order[0]["found"][0]["near"]
    kinds = ["right" if right else "wrong" for _, _, right in near]
    assert re.findall(r'class="box (\w+)"', article) == ["query", *kinds]
    assert f">{near[0][1]:.3f}<br>cam {data['images'][near[0][0]]['camid']}<" in article
    assert 'class="maps"' not in dom


@needs_chromium
@pytest.mark.parametrize("state, chosen", [
    ("#sort=easiest", lambda q, image: True),
    ("#camera=2", lambda q, image: image["camid"] == 2),
    ("#first=1", lambda q, image: q["found"][0]["first"] > 1),
    ("#person=9", lambda q, image: image["pid"] == 9),
    ("#person=0009_C3", lambda q, image: "0009_c3" in image["path"]),
    ("#camera=3&first=1&sort=easiest", lambda q, image: image["camid"] == 3 and q["found"][0]["first"] > 1),
    ("#sort=nonsense&camera=99", lambda q, image: True),
])  # fmt: skip
def test_filters_and_order_in_a_browser(pages, tmp_path, state, chosen):
    data = page_data(pages / "one.html")
    dom, console = browse(pages / "one.html", tmp_path, state)
    shown = [query for query in data["queries"] if chosen(query, data["images"][query["image"]])]
    shown.sort(key=lambda query: -ap(query) if "easiest" in state else ap(query))
    assert console == [] and 0 < len(shown) and (len(shown) < 18 or "camera=99" in state or state == "#sort=easiest")
    assert listed(dom) == ([query["image"] for query in shown], f"{len(shown)} of 18 queries")


@needs_chromium
def test_controls_in_a_browser(pages, tmp_path):
    """Used as a person would: each change redraws the list and is kept in the address."""
    script = """
        const set = (id, property, value) => { at(id)[property] = value; at(id).dispatchEvent(new Event("input")); };
        set("sort", "value", "easiest"); set("camera", "value", "1"); set("maps", "checked", true);
        document.querySelector("article details").open = true;
        const canvas = document.querySelector("article canvas"), context = canvas.getContext("2d");
        const pixels = [...context.getImageData(0, 0, canvas.width, canvas.height).data];
        const words = { state: location.hash, focus: [], size: [canvas.width, canvas.height], pixels,
          map: [...atob(data.runs[0].maps.of[canvas.dataset.image])].map(c => c.charCodeAt(0)) };
        for (const id of controls) { at(id).focus(); words.focus.push(document.activeElement.id); }
        setTimeout(() => { document.title = JSON.stringify(words); }, 100);
    """
    data = page_data(pages / "one.html")
    dom, console = browse(pages / "one.html", tmp_path, script=script)
    assert console == []
    shown = [query for query in data["queries"] if data["images"][query["image"]]["camid"] == 1]
    assert listed(dom)[0] == [query["image"] for query in sorted(shown, key=lambda query: -ap(query))]
    words = json.loads(re.search("<title>(.*?)</title>", dom)[1].replace("&amp;", "&"))
    assert words["state"] == "#sort=easiest&camera=1&maps=1" and 'class="maps"' in dom
    assert words["focus"] == ["sort", "camera", "person", "first", "maps"]
    pixels = np.array(words["pixels"]).reshape(-1, 4)
    assert words["size"] == [data["runs"][0]["maps"][key] for key in ("width", "height")]
    assert (pixels[np.argmax(words["map"])] == [253, 231, 37, 255]).all()  # yellow where it is longest
    opened = re.search(r"<details open.*?</details>", dom, flags=re.S)[0]
    assert data["images"][listed(dom)[0][0]]["path"] in opened


@needs_chromium
def test_two_runs_in_a_browser(runs, pages, tmp_path):
    data = page_data(pages / "both.html")
    gain = {query["image"]: query["found"][0]["ap"] - query["found"][1]["ap"] for query in data["queries"]}
    keys = {"": lambda i: -abs(gain[i]), "#sort=one": lambda i: -gain[i], "#sort=two": lambda i: gain[i]}
    for state, key in keys.items():
        dom, console = browse(pages / "both.html", tmp_path, state)
        assert console == [] and [key(i) for i in listed(dom)[0]] == sorted(map(key, gain))
    article = re.search(r"<article.*?</article>", dom, flags=re.S)[0]
    assert len(re.findall('class="near"', article)) == 2 and "two: AP" in article and "one &lt;b&gt;: AP" in article


@needs_chromium
def test_console_errors_are_seen(pages, tmp_path):
    """The tests above can fail."""
    assert browse(pages / "one.html", tmp_path, script="nothing.there()")[1]


# ----------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", ["show", "embed", "search", "compare", "export"])
def test_help_and_mistakes_as_from_a_shell(name, tmp_path, monkeypatch, capsys):
    """`python -m tools.NAME`, in this process: starting five takes half a minute."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(*words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(f"tools.{name}", run_name="__main__")
        return stopped.value.code

    assert not call("--help") and f"python -m tools.{name} --run" in capsys.readouterr().out
    needed = {"show": [], "embed": [str(ROOT / "results"), "x.npz"], "compare": ["a.jpg", "b.jpg"],
              "export": ["x.onnx"], "search": ["--query", "a.jpg", "--gallery", "b"]}  # fmt: skip
    said = call(*needed[name], "--run", str(tmp_path))
    assert said.startswith(f"tools.{name}: ") and len(said.splitlines()) == 1


# --------------------------------------------------------------------------------------------------------------- README

README = (ROOT / "tools/README.md").read_text()


def test_from_photographs_to_a_ranked_list(tiny_market, tmp_path, monkeypatch, capsys):
    """The README's six commands in order, but for the installation, with a network that trains in seconds."""
    for path in (tiny_market / "bounding_box_test").iterdir():
        place = tmp_path / "photos" / {"0007": "anna"}.get(path.name[:4], path.name[:4])
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{1 + len(list(place.iterdir()))}.jpg")
    (block,) = re.findall(r"```bash\n(pip install .*?)```", README, flags=re.S)
    install, *lines = block.splitlines()
    assert install == "pip install -r requirements.txt" and len(lines) == 5
    monkeypatch.chdir(tmp_path)
    quick = ["--arch", "resnet18", "--weights", "none", "--height", "32", "--width", "16", "--epochs", "1", "--p", "3"]
    for line in lines:
        words = line.split()[1:]
        name, flags = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
        flags += (quick if name == "train" else []) + ([] if name == "data.check" else CPU)
        importlib.import_module(name).main(flags)
    out = capsys.readouterr().out
    assert len(table_rows(out)) == 10 and "photos/anna/1.jpg\n" in out
    assert Path("search.png").is_file() and Path("runs/photos/show.html").is_file()


def test_embed_crops_of_a_tracker(run, tiny_market, monkeypatch):
    (block,) = re.findall(r"```python\n(from pathlib.*?)```", README, flags=re.S)
    names = {}
    exec(block.replace('"runs/photos"', repr(str(run))), names)
    paths = sorted((tiny_market / "query").iterdir())[:3]
    crops = [np.asarray(Image.open(path))[..., ::-1] for path in paths]
    rows = torch.from_numpy(wanted(run, paths))
    torch.testing.assert_close(names["embed_crops"](crops), torch.nn.functional.normalize(rows), atol=1e-5, rtol=0)


def test_the_exported_file_without_this_project(run, tiny_market, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export.main([str(tmp_path / "model.onnx"), "--run", str(run)])
    (block,) = re.findall(r"```python\n(import json.*?)```", README, flags=re.S)
    paths = sorted((tiny_market / "query").iterdir())[:2]
    for path, name in zip(paths, ("a.jpg", "b.jpg"), strict=True):
        shutil.copy(path, tmp_path / name)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = wanted(run, paths)
    cosine = rows[0] @ rows[1] / np.prod(np.linalg.norm(rows, axis=1))
    assert float(done.stdout.split()[1]) == pytest.approx(cosine, abs=1e-4)


def test_every_command_of_the_readme_parses(capsys):
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S) for line in block.splitlines()]
    lines += re.findall(r"^\| `(python -m tools.*?)`", README, flags=re.M)
    known = {"show", "embed", "search", "compare", "export"}
    assert {name for line in lines for name in re.findall(r"tools\.(\w+)", line)} == known
    for line in lines:
        if match := re.match(r"python -m tools\.(\w+) (.*)", line):
            with pytest.raises((UserError, OSError)):  # the flags are known, the run is not there
                importlib.import_module(f"tools.{match[1]}").main(match[2].replace("runs/", "nowhere/").split())


def test_tools_import_neither_training_nor_losses():
    """And what is optional only where it is needed."""

    def imports(nodes):
        for node in nodes:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            yield from names or [alias.name for alias in node.names if isinstance(node, ast.Import)]

    for path in (ROOT / "tools").glob("*.py"):
        tree = ast.parse(path.read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {name.split(".")[0] for name in imports(nodes)}
        assert not found & {"train", "losses", "torchvision", "benchmarks"}, path
        found = {name.split(".")[0] for name in imports(set(nodes) & set(tree.body))}
        assert not found & {"matplotlib", "onnx", "onnxruntime", "onnxscript"}, path
