"""The tricks: each is what its definition says, typed again image by image; alone and together; the old pixels stay."""

import json
import math

import pytest
import torch
from conftest import short_run

import evaluate
import train
from data import images
from data.augment import ATTEMPTS, erasing_boxes, flip, pad_crop, random_erasing
from data.images import TrainingImages, stream_images
from data.market1501 import market1501
from losses import ROWS, settable_arguments
from models.backbone import build_model
from utils.flags import DEFAULTS, new_run
from utils.recipes import recipe_values

pytestmark = pytest.mark.filterwarnings("ignore:Market-1501 in")
CPU = torch.device("cpu")
TRICKS = {"flip_test", "last_stride", "pool", "neck", "milestones", "warmup", "pad_crop", "random_erasing"}


def draws(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def paths(tiny_market):
    return [record.path for record in market1501(tiny_market, check_counts=False).train[:12]]


def log_of(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- augmentation


def test_pad_crop_image_by_image():
    """A black frame, and of what is framed a window of the old size whose corner is one of (2 * pixels + 1)^2."""
    images = torch.randint(1, 256, (400, 12, 6, 3), dtype=torch.uint8)
    places, corners = draws(400, 2), set()
    for image, place, cropped in zip(images, places.tolist(), pad_crop(images, 3, places), strict=True):
        framed = torch.zeros(18, 12, 3, dtype=torch.uint8)
        framed[3:15, 3:9] = image
        top, left = math.floor(place[0] * 7), math.floor(place[1] * 7)
        assert torch.equal(cropped, framed[top : top + 12, left : left + 6])
        corners.add((top, left))
    assert len(corners) == 49
    assert torch.equal(pad_crop(images, 3, torch.full((400, 2), 0.5)), images)  # the middle


def erased_slowly(image, probability, numbers):
    """Zhong et al.'s procedure, with the numbers that chance gives it: returns a copy of an image (3, H, W)."""
    image, (_, H, W) = image.clone(), image.shape
    if numbers[0] >= probability:
        return image
    for attempt in range(ATTEMPTS):
        area = (0.02 + 0.38 * numbers[3 + 2 * attempt]) * H * W
        aspect = 0.3 + (1 / 0.3 - 0.3) * numbers[4 + 2 * attempt]
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < H and width < W:
            top, left = math.floor(numbers[1] * (H - height + 1)), math.floor(numbers[2] * (W - width + 1))
            for row in range(top, top + height):
                for column in range(left, left + width):
                    image[:, row, column] = 0
            return image
    return image


def test_random_erasing_image_by_image():
    numbers = draws(400, 3 + 2 * ATTEMPTS)
    images = torch.rand(400, 3, 32, 16) + 1
    erased = random_erasing(images, erasing_boxes(numbers, 0.5, 32, 16))
    for image, own, result in zip(images, numbers.tolist(), erased, strict=True):
        assert torch.equal(result, erased_slowly(image, 0.5, own))
    shares = (erased == 0).float().mean((1, 2, 3))
    assert 0.4 < (shares > 0).float().mean() < 0.6
    shares = shares[shares > 0]
    assert 0.01 < shares.min() < 0.04 and 0.34 < shares.max() < 0.43  # rounded to whole pixels


def test_random_erasing_reaches_every_corner_and_never_all():
    boxes = erasing_boxes(draws(20000, 3 + 2 * ATTEMPTS), 1.0, 32, 16)
    top, bottom, left, right = boxes.unbind(dim=1)
    assert (top.min(), left.min(), bottom.max(), right.max()) == (0, 0, 32, 16)
    assert (bottom > top).all() and (right > left).all() and (right - left).max() < 16
    nothing = erasing_boxes(draws(100, 3 + 2 * ATTEMPTS), 0.0, 32, 16)
    images = torch.rand(100, 3, 32, 16)
    assert torch.equal(random_erasing(images, nothing), images)


def test_a_rectangle_that_does_not_fit_is_drawn_again_and_given_up_after_ten():
    """An area of 0.4 with an aspect of 0.3 is 26 wide, in an image of 32 x 16; one of 0.02 with 1 is 3 x 3."""
    too_wide, small = [1.0, 0.0], [0.0, 0.7 / (1 / 0.3 - 0.3)]
    numbers = torch.tensor([[0.0, 0.0, 0.0, *too_wide * tries, *small * (ATTEMPTS - tries)] for tries in (0, 1, 9, 10)])
    boxes = erasing_boxes(numbers, 0.5, 32, 16).tolist()
    assert boxes == [[0, 3, 0, 3], [0, 3, 0, 3], [0, 3, 0, 3], [0, 0, 0, 0]]


def test_new_draws_leave_the_old_pixels_alone(paths):
    """With all of it on, the flips are the same ones; outside of the rectangles nothing differs."""
    order = torch.arange(12).repeat(3, 1)
    old = list(TrainingImages(paths, 64, 32, CPU).batches(order, seed=1, epoch=2))
    erased = list(TrainingImages(paths, 64, 32, CPU, random_erasing=0.5).batches(order, seed=1, epoch=2))
    flips = 0
    plain = torch.cat(list(stream_images(paths, 64, 32, CPU, batch_size=12, workers=0)))
    for before, after in zip(old, erased, strict=True):
        changed = (before != after).any(1)
        assert (after.movedim(1, -1)[changed] == 0).all() and 0.02 < changed.float().mean() < 0.3
        assert after.is_contiguous(memory_format=torch.channels_last)
        flips += sum(not torch.equal(image, same) for image, same in zip(before, plain, strict=True))
    assert 8 < flips < 28
    both = TrainingImages(paths, 64, 32, CPU, pad_crop=10, random_erasing=0.5)
    for before, after in zip(erased, both.batches(order, seed=1, epoch=2), strict=True):
        inner = (before == 0).all(1) == (after == 0).all(1)
        assert inner.all()  # the rectangles are where they were


def test_each_kind_of_draw_has_a_generator_of_its_own(paths, monkeypatch):
    """By (seed, epoch, kind), for the kinds that are on: two that shared one would agree on what they change."""
    used, order = [], torch.arange(12).view(1, 12)
    monkeypatch.setattr(images, "mix_seed", lambda *numbers: used.append(numbers) or 0)
    list(TrainingImages(paths, 64, 32, CPU, pad_crop=10, random_erasing=0.5).batches(order, seed=5, epoch=2))
    assert used == [(5, 2, 1), (5, 2, 2), (5, 2, 3)]
    used.clear()
    list(TrainingImages(paths, 64, 32, CPU).batches(order, seed=5, epoch=2))
    assert used == [(5, 2, 1)]


def test_the_border_scales_with_the_height(paths):
    """40 pixels at 256 are 10 at 64: so many black rows there are at most, and somewhere in 480 images so many."""
    padded = TrainingImages(paths, 64, 32, CPU, pad_crop=40)
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    widest = 0
    for batch in padded.batches(torch.arange(12).repeat(40, 1), seed=0, epoch=0):
        framed = (batch - black[:, None, None]).abs().amax(1) < 1e-5  # (B, H, W)
        widest = max(widest, framed.all(2).sum(1).max().item())
    assert widest == 10
    borders = [TrainingImages(paths, h, 64, CPU, cache="off", pad_crop=10).border for h in (256, 128, 384)]
    assert borders == [10, 5, 15]


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_and_workers_never_change_a_pixel(paths, workers):
    order = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    how = {"random_crop": True, "pad_crop": 10, "random_erasing": 0.5}
    kept, read = (
        torch.stack(list(TrainingImages(paths, 64, 32, CPU, cache=cache, workers=workers, **how).batches(order, 3, 2)))
        for cache in ("auto", "off")
    )
    assert torch.equal(kept, read)
    share = TrainingImages(paths, 64, 32, CPU, workers=workers, **how).batches(order, 3, 2, slice(1, 3))
    assert torch.equal(torch.stack(list(share)), kept[:, 1:3])  # one process's rows of each batch
    other = torch.stack(list(TrainingImages(paths, 64, 32, CPU, workers=0, **how).batches(order, 3, 1)))
    assert not torch.equal(kept, other)  # another epoch


def test_flip_image_by_image():
    images = torch.randint(0, 256, (50, 4, 3, 3), dtype=torch.uint8)
    numbers = draws(50)
    for image, number, result in zip(images, numbers.tolist(), flip(images, numbers), strict=True):
        assert torch.equal(result, image.flip(1) if number < 0.5 else image)


# ----------------------------------------------------------------------------------------------- warm-up and schedule


def test_warmup_by_hand():
    """From a tenth, linear, to the whole rate at the end of epoch 10; then the milestones as ever."""
    factors = [train.learning_rate_factor(epoch, [20, 35], 10) for epoch in (0, 2.5, 5, 9.99, 10, 19, 20, 35)]
    assert factors == pytest.approx([0.1, 0.325, 0.55, 0.9991, 1, 1, 0.1, 0.01])
    assert train.learning_rate_factor(1, [1], 2) == pytest.approx(0.055)  # a milestone within it
    assert [train.learning_rate_factor(epoch, [2, 3]) for epoch in (0, 1.5, 2, 2.9, 3)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


def test_every_step_has_its_rate(small_network, flags, tmp_path, monkeypatch):
    """Two epochs of three steps, a warm-up of one and a half: a fifth more of the rate with each step."""
    rates, step = [], torch.optim.Adam.step

    def watched(optimizer, *args, **kwargs):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    schedule = ["--epochs", "2", "--warmup", "1.5", "--milestones", "--lr", "0.01", "--loss-lr", "0.1"]
    train.main(["--loss", "softmax", *flags, *schedule])
    factors = [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    assert [rate for rate, _ in rates] == pytest.approx([0.01 * factor for factor in factors])
    assert [rate for _, rate in rates] == pytest.approx([0.1 * factor for factor in factors])
    assert [line["lr"] for line in log_of(tmp_path / "run")] == pytest.approx([0.005, 0.01])  # of an epoch's last step


# -------------------------------------------------------------------------------------------------------- flip at test


def test_flip_test_is_the_mean_of_two_embeddings(tiny_market):
    paths = [record.path for record in market1501(tiny_market, check_counts=False).query]
    torch.manual_seed(0)
    model = build_model("resnet18", height=32, width=16).eval()
    found = evaluate.embed(model, paths, height=32, width=16, device=CPU, workers=0, flip_test=True)
    images = torch.cat(list(stream_images(paths, 32, 16, CPU, 100, 0)))
    with torch.inference_mode():
        for image, embedding in zip(images, found, strict=True):
            mirrored = torch.stack([image[:, :, 15 - column] for column in range(16)], dim=2)
            one, other = model(torch.stack([image, mirrored]))
            torch.testing.assert_close(embedding, (one + other) / 2, rtol=1e-4, atol=1e-5)
    plain = evaluate.embed(model, list(map(str, paths)), height=32, width=16, device=CPU, workers=0)  # text will do
    assert not torch.allclose(plain, found)


def test_flip_test_only_scores_again(small_network, flags, tmp_path, capsys):
    """The same weights; evaluate.py turns it on and off, and keeps both numbers."""
    run_dir, other = tmp_path / "run", tmp_path / "flipped"
    train.main(["--loss", "softmax", *flags, "--epochs", "1"])
    train.main(["--loss", "softmax", *flags[:-1], str(other), "--epochs", "1", "--flip-test"])
    states = [torch.load(place / "last.pt", weights_only=True)["model"] for place in (run_dir, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    results = [json.loads((place / "result.json").read_text()) for place in (run_dir, other)]
    assert results[0]["mAP"] != results[1]["mAP"]
    for place, words, name, wanted in [
        (run_dir, ["--flip-test"], "evaluation_market_cosine_flip-test.json", results[1]),
        (run_dir, [], "evaluation_market_cosine.json", results[0]),
        (other, [], "evaluation_market_cosine_flip-test.json", results[1]),
        (other, ["--no-flip-test"], "evaluation_market_cosine.json", results[0]),
    ]:
        evaluate.main(["--run", str(place), "--device", "cpu", *words])
        assert json.loads((place / name).read_text())["mAP"] == pytest.approx(wanted["mAP"], abs=1e-9), words
    train.main(["--resume", "--run-dir", str(run_dir), "--flip-test"])  # of a finished run: printed, as ever
    assert "finished" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- the recipe


def test_the_recipe_by_hand():
    args = new_run({"loss": "softmax", "dataset": "market", "recipe": "tricks"})
    wanted = {"warmup": 10, "milestones": [20, 35], "pad_crop": 10, "random_erasing": 0.5, "last_stride": 1,
              "pool": "gem", "neck": "bn", "flip_test": True, "epochs": 60, "lr": 3.5e-4, "p": 16, "k": 4}  # fmt: skip
    assert {key: args[key] for key in wanted} == wanted
    assert args["loss_args"] == ["softmax.label_smoothing=0.1"]
    quick = new_run({"loss": "softmax+triplet", "dataset": "synthetic", "recipe": "tricks"})
    assert (quick["milestones"], quick["warmup"], quick["epochs"], quick["arch"]) == ([2, 3], 0.8333, 5, "resnet18")
    assert quick["loss_args"] == ["triplet.margin=None", "softmax.label_smoothing=0.1"]
    longer = new_run({"loss": "softmax", "dataset": "market", "recipe": "tricks", "epochs": 120, "pool": "avg"})
    assert (longer["milestones"], longer["warmup"], longer["pool"]) == ([40, 70], 20, "avg")
    assert new_run({"loss": "softmax", "dataset": "market", "recipe": "tricks", "milestones": [3]})["milestones"] == [3]


@pytest.mark.parametrize("dataset", ["market", "synthetic"])
def test_tricks_are_controlled_plus_the_tricks(dataset):
    """Whatever else differs is label smoothing, where a term of the loss has it; no trick is on anywhere else."""
    for row in ROWS:
        given = {"loss": row, "dataset": dataset}
        plain, tricks = new_run(given), new_run({**given, "recipe": "tricks"})
        differing = {key for key in DEFAULTS if plain[key] != tricks[key]} - {"recipe"}
        assert differing == TRICKS, row
        smoothed = [name for name in row.split("+") if "label_smoothing" in settable_arguments(name)]
        assert sorted(tricks["loss_args"]) == sorted(
            plain["loss_args"] + [f"{name}.label_smoothing=0.1" for name in smoothed]
        )
        for recipe in ("controlled", "published"):
            assert not recipe_values(recipe, row, dataset).keys() & (TRICKS - {"milestones"})


ALONE = ["--warmup 1", "--random-erasing 0.5", "--pad-crop 40", "--last-stride 1", "--neck bn", "--pool gem"]


def trained(flags, folder, *words):
    """The result of one epoch of a real ResNet-18."""
    size = ["--height", "64", "--width", "32"]
    train.main(["--loss", "softmax", *flags[:-1], str(folder), *size, "--epochs", "1", "--save-every", "60", *words])
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def plain(tiny_market, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return trained(short_run(tiny_market, folder), folder / "run")


@pytest.mark.parametrize("switch", [*ALONE, "--random-crop", "--loss-args label_smoothing=0.1", "--recipe tricks"])
def test_each_switch_trains_and_is_scored_the_same_later(plain, flags, tmp_path, switch):
    """The run's numbers differ from the plain one's, and evaluate.py finds them again."""
    run = trained(flags, tmp_path / "run", *switch.split())
    assert plain["log"][0]["loss"] != run["log"][0]["loss"] and plain["mAP"] != run["mAP"]
    evaluate.main(["--run", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"])
    (again,) = (tmp_path / "run").glob("evaluation_*.json")
    assert json.loads(again.read_text())["mAP"] == pytest.approx(run["mAP"], abs=1e-9)


def test_a_run_with_all_tricks_goes_on_bit_for_bit(flags, tmp_path):
    """Stopped after the first of two epochs."""
    words = ["--loss", "softmax", *flags[:-1]]
    train.main([*words, str(tmp_path / "whole"), "--recipe", "tricks", "--epochs", "2"])

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        save = train.save_checkpoint
        patch.setattr(train, "save_checkpoint", lambda *content: (save(*content), stop()))
        with pytest.raises(Stop):
            train.main([*words, str(tmp_path / "run"), "--recipe", "tricks", "--epochs", "2"])
    assert len(log_of(tmp_path / "run")) == 1
    train.main(["--resume", "--run-dir", str(tmp_path / "run")])
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("whole", "run")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_older_than_these_flags_goes_on(small_network, flags, tmp_path):
    """Neither its args.json nor its checkpoint knows them: they count as their defaults."""
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "score_all", lambda *_, **__: pytest.fail("stopped before the scoring"))
        with pytest.raises(pytest.fail.Exception):
            train.main(["--loss", "softmax", *flags, "--epochs", "1"])
    checkpoint = torch.load(run_dir / "last.pt", weights_only=True)
    for path, content in [(run_dir / "args.json", json.loads((run_dir / "args.json").read_text())),
                          (None, json.loads(checkpoint["args"]))]:  # fmt: skip
        old = {key: value for key, value in content.items() if key not in TRICKS - {"milestones"}}
        if path:
            path.write_text(json.dumps(old))
        else:
            torch.save({**checkpoint, "args": json.dumps(old)}, run_dir / "last.pt")
    train.main(["--resume", "--run-dir", str(run_dir)])
    assert (run_dir / "result.json").is_file()
    model, args = evaluate.load_run(run_dir, CPU)
    assert args["last_stride"] == 2 and args["neck"] == "none"


def test_another_last_stride_is_another_run(small_network, flags, tmp_path):
    """It changes no shape: only the checkpoint's own flags tell."""
    train.main(["--loss", "softmax", *flags, "--epochs", "1"])
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(json.dumps({**args, "last_stride": 1}))
    with pytest.raises(ValueError, match="its last_stride is 2, not 1"):
        evaluate.load_run(tmp_path / "run", CPU)


# ------------------------------------------------------------------------------------------------ weights without a run


def test_scoring_weights_without_training_and_fine_tuning_a_finished_run(flags, tmp_path, capsys):
    """`--epochs 0 --weights FILE` scores the file as it is; further epochs begin where a finished run ended."""
    words = ["--loss", "softmax", *flags[:-1]]
    train.main([*words, str(tmp_path / "first"), "--epochs", "1", "--neck", "bn"])
    first = json.loads((tmp_path / "first" / "result.json").read_text())
    last = str(tmp_path / "first" / "last.pt")
    train.main([*words, str(tmp_path / "scored"), "--epochs", "0", "--weights", last, "--neck", "bn"])
    assert f"{last}, for resnet18: 124 tensors loaded\n" in capsys.readouterr().out
    scored = json.loads((tmp_path / "scored" / "result.json").read_text())
    assert scored["mAP"] == pytest.approx(first["mAP"], abs=1e-9) and scored["log"] == []
    words += [str(tmp_path / "tuned"), "--loss", "triplet"]
    train.main([*words, "--epochs", "1", "--weights", last, "--lr", "1e-12"])
    assert "120 tensors loaded, left out: fc.neck.num_batches_tracked" in capsys.readouterr().out
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("first", "tuned")]
    torch.testing.assert_close(states[1]["conv1.weight"], states[0]["conv1.weight"], rtol=0, atol=1e-6)
