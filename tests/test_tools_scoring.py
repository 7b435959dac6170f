"""evaluate.py --rerank and --verification, and utils/verification.py: against what a sort of all pairs gives."""

import json

import numpy as np
import pytest
import torch

import evaluate
import train
from utils.features import Features, save_features
from utils.ranking import metrics_from_distance
from utils.reranking import rerank
from utils.verification import at_rate, count_pairs, rates, similarities, verification

KEYS = ("query", "query_pids", "query_camids", "gallery", "gallery_pids", "gallery_camids")


def random_features(seed=0, num_query=30, num_gallery=80, dim=8):
    rng = np.random.default_rng(seed)
    people = rng.normal(size=(9, dim))
    pids, camids = rng.integers(1, 9, num_query + num_gallery), rng.integers(0, 3, num_query + num_gallery)
    pids[-6:], pids[-12:-6] = -1, 0
    rows = (people[pids] + rng.normal(size=(len(pids), dim))).astype(np.float32)
    names = np.array([f"{i}.jpg" for i in range(len(pids))])
    q = slice(num_query)
    g = slice(num_query, None)
    return Features(rows[q], pids[q], camids[q], rows[g], pids[g], camids[g], names[q], names[g])


def all_pairs(f, metric):
    """Similarities of one person's pairs, and of two people's, one after the other."""
    one, two = [], []
    for q, pid, camid in zip(f.query.astype(float), f.query_pids, f.query_camids, strict=True):
        for g, other, camera in zip(f.gallery.astype(float), f.gallery_pids, f.gallery_camids, strict=True):
            similarity = q @ g / np.linalg.norm(q) / np.linalg.norm(g) if metric == "cosine" else -np.linalg.norm(q - g)
            if other != -1 and not (other == pid and camera == camid):
                (one if other == pid else two).append(similarity)
    return np.array(one), np.array(two)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("block", [7, 2048])
def test_verification_against_all_pairs_one_by_one(metric, block):
    f = random_features()
    one, two = all_pairs(f, metric)
    found = verification(pairs := count_pairs(*(getattr(f, key) for key in KEYS), metric=metric, block=block))
    assert (found["positive_pairs"], found["negative_pairs"]) == (len(one), len(two))
    for rate in (0.2, *map(float, found["at_fpr"])):
        at = at_rate(pairs, rate)
        threshold = np.sort(two)[::-1][int(rate * len(two))]  # the first similarity that must not pass
        assert threshold <= at["threshold"] <= threshold + 1e-4
        assert at["tpr"] == pytest.approx((one >= at["threshold"]).mean(), abs=1e-12)
        assert at["false_matches"] == (two >= at["threshold"]).sum() <= rate * len(two)
    best = min(max((two >= t).mean(), (one < t).mean()) for t in np.concatenate([one, two]))
    assert found["equal_error_rate"] == pytest.approx(best, abs=1 / len(one) + 1 / len(two))
    t = found["equal_error_threshold"]
    assert (two >= t).mean() == pytest.approx((one < t).mean(), abs=1 / len(one))


def test_verification_by_hand():
    """One query of person 1 by camera 1. Gallery: the person by camera 2 at 60 degrees (0.5), by camera 1 (dropped),
    junk (dropped), another person at 90 degrees (0), a distractor at 180 degrees (-1)."""
    gallery = torch.tensor([[0.5, 3**0.5 / 2], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    pairs = count_pairs(torch.tensor([[3.0, 0.0]]), [1], [1], gallery, [1, 1, -1, 2, 0], [2, 1, 1, 1, 2])
    found = verification(pairs)
    assert (found["positive_pairs"], found["negative_pairs"], found["equal_error_rate"]) == (1, 2, 0)
    assert found["equal_error_threshold"] == pytest.approx(0.25, abs=1e-4)  # in the middle between 0 and 0.5
    assert at_rate(pairs, 0.5)["threshold"] == pytest.approx(-1, abs=1e-4) and at_rate(pairs, 0.5)["false_matches"] == 1
    edges, tpr, fpr = rates(pairs)
    assert (tpr[0], fpr[0], tpr[-1], fpr[-1]) == (1, 1, 0, 0) and (edges.diff() > 0).all()


@pytest.mark.parametrize("dtype", ["u1", ">i4", ">i8"])
def test_ids_of_any_type_mean_people(dtype, recwarn):
    """As the ranking reads them: 255 of a uint8 is no junk. Embeddings may be of another byte order, and read-only."""
    f = random_features()
    numbers = f._replace(query_pids=f.query_pids + 247, gallery_pids=f.gallery_pids % 9 + 247)  # 8, 255, was junk
    plain = count_pairs(*numbers[:6])
    assert plain.negative.sum() > count_pairs(*f[:6]).negative.sum()
    read = {key: getattr(numbers, key).astype(dtype) for key in KEYS if "ids" in key}
    read["gallery"], read["query"] = f.gallery.astype(">f4"), f.query.copy()
    read["query"].flags.writeable = False
    found = count_pairs(*numbers._replace(**read)[:6])
    assert torch.equal(found.positive, plain.positive) and torch.equal(found.negative, plain.negative)
    assert not recwarn.list


def test_verification_needs_both_kinds_of_pairs():
    rows = torch.eye(2)
    with pytest.raises(ValueError, match="pairs of one person under two cameras, and there is none"):
        count_pairs(rows, [1, 2], [1, 1], rows, [1, 2], [1, 1])
    with pytest.raises(ValueError, match="pairs of two people, and there is none"):
        count_pairs(rows, [1, 1], [1, 1], rows, [1, 1], [2, 2])


def test_similarities():
    one, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(similarities(one, other), torch.tensor([[0.5**0.5, 0]]).double())
    torch.testing.assert_close(similarities(one, other, "euclidean"), -torch.tensor([[2**0.5, 2]]).double())


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("how", [{}, {"k1": 5, "k2": 2, "lambda_": 0.1}])
def test_reranked_scores_are_those_of_the_whole_matrix(metric, how):
    f = random_features(num_query=40)
    distance = torch.cat([block for _, block in rerank(f.query, f.gallery, metric, **how)])
    ids = f.query_pids, f.query_camids, f.gallery_pids, f.gallery_camids
    found = evaluate.score(f, metric, reranking={**evaluate.RERANK, **how})
    assert found == pytest.approx(metrics_from_distance(distance, *ids), abs=1e-12)
    assert found != evaluate.score(f, metric)


def test_features_reranked_and_verified_from_the_command_line(tmp_path, capsys):
    f = random_features()
    path = str(save_features(tmp_path / "f.npz", f))
    evaluate.main(["--features", path, "--rerank", "--k1", "5", "--lambda", "0.1", "--device", "cpu"])
    out = capsys.readouterr().out
    wanted = evaluate.score(f, reranking={"k1": 5, "k2": 6, "lambda_": 0.1})
    assert "f.npz, cosine, re-ranked" in out and f"{100 * wanted['mAP']:.2f}" in out
    assert f"{100 * evaluate.score(f)['mAP']:.2f}" not in out
    evaluate.main(["--features", path, "--verification", "--device", "cpu"])
    out = capsys.readouterr().out
    found = evaluate.score(f, verify=True)["verification"]
    assert "re-ranked" not in out and f"{found['positive_pairs']:,} pairs of one person" in out
    assert f"{found['at_fpr']['0.001']['threshold']:.4f}" in out


@pytest.mark.parametrize("flags, sentence", [
    (["--k1", "5"], "--k1 belongs to --rerank"),
    (["--lambda", "0.5"], "--lambda belongs to --rerank"),
    (["--rerank", "--verification"], "give one of the two"),
    (["--rerank", "--k2", "0"], "--k2"),
    (["--rerank", "--lambda", "1.5"], "--lambda"),
])  # fmt: skip
def test_flags_that_do_not_fit(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--features", "f.npz", *flags])
    assert sentence in capsys.readouterr().err


def test_a_run_keeps_reranked_numbers_in_a_file_of_their_own(flags, tmp_path, small_network, capsys):
    train.main(["--loss", "softmax", *flags, "--epochs", "1"])
    folder = tmp_path / "run"
    capsys.readouterr()
    for more in ([], ["--rerank"], ["--rerank", "--k1", "3"], ["--verification"]):
        evaluate.main(["--run", str(folder), "--device", "cpu", *more])
    out = capsys.readouterr().out
    assert out.count("run on market, cosine, re-ranked") == 2 and "of the test set, which they describe" in out
    names = sorted(path.name for path in folder.glob("evaluation_*"))
    assert names == [f"evaluation_market_cosine{end}.json" for end in ("", "_k1-3_rerank", "_rerank", "_verification")]
    plain, k1, reranked, verified = (json.loads((folder / name).read_text()) for name in names)
    result = json.loads((folder / "result.json").read_text())
    assert plain["mAP"] == verified["mAP"] == result["mAP"] != reranked["mAP"]
    assert (k1["k1"], reranked["k1"], reranked["lambda_"]) == (3, 20, 0.3) and "k1" not in plain
    assert verified["verification"]["positive_pairs"] > 0 and "verification" not in plain


def test_thresholds_of_a_run_with_held_out_people(flags, tmp_path, small_network, capsys):
    train.main(["--loss", "softmax", *flags, "--epochs", "1", "--eval-on", "val"])
    evaluate.main(["--run", str(tmp_path / "run"), "--device", "cpu", "--verification"])
    assert "found on the people held out, none of the test" in capsys.readouterr().out
    evaluate.main(["--run", str(tmp_path / "run"), "--device", "cpu", "--verification", "--eval-on", "test"])
    assert "found on the people of the test set" in capsys.readouterr().out
    names = [f"evaluation_market_{name}verification.json" for name in ("cosine_", "test_cosine_")]
    found = [json.loads((tmp_path / "run" / name).read_text()) for name in names]
    assert [(scores["eval_on"], scores["num_queries"]) for scores in found] == [("val", 6), ("test", 18)]


def test_curves_for_tensorboard(flags, tmp_path, small_network, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.main(["--loss", "softmax", *flags, "--epochs", "2", "--tensorboard", "--eval-every", "1"])
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in log])
    assert {"lr", "images_per_second", "mAP", "rank1"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("mAP")) == 2
    (tmp_path / "run/result.json").unlink()  # resumed into the scoring: the last epoch's curves stay
    train.main(["--resume", "--run-dir", str(tmp_path / "run")])
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_without_tensorboard_a_sentence_and_no_run(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train.main(["--loss", "softmax", *flags, "--tensorboard"])
    assert not (tmp_path / "run").exists()
