"""Recipes: every row is understood, an explicit flag wins, the published settings are the published ones; and how a
recipe and flags become one dict, a name and a command."""

import json
import shlex

import pytest

import train
from data import DATASETS
from losses import ROWS, TWELVE, build_loss, parse_expression, row_name, settable_arguments
from utils.flags import (
    DEFAULTS,
    FREE,
    OPPOSITES,
    SCORING,
    WORKED_OUT,
    build_parser,
    command_line,
    least_scale,
    new_run,
    run_name,
    show_flags,
    work_out,
)
from utils.recipes import RECIPES, recipe_values

OWN = ("loss_args", *WORKED_OUT, "loss_weights", "loss_lr")  # what rows of the controlled recipe may set


def run_of(loss="softmax", dataset="market", **explicit):
    return new_run({"loss": loss, "dataset": dataset, **explicit})


def typed(text):
    """The flags that a shell makes of a line, as train.py's parser reads them."""
    return vars(build_parser().parse_args(shlex.split(text, comments=True)))


def values_of(loss_fn):
    """Every constructor argument that is kept as an attribute, of a loss or of the terms of a sum."""
    return {f"{place}.{key}": value for place, module in loss_fn.named_modules() for key, value in vars(module).items()
            if isinstance(value, int | float | None) and not key.startswith("_") and key != "training"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_gives_flags_that_exist_and_a_loss_that_can_be_built(recipe, dataset, row):
    values = recipe_values(recipe, row, dataset)
    assert values.keys() - {"loss_args", *WORKED_OUT, "loss_weights"} <= DEFAULTS.keys()
    args = work_out(run_of(row, dataset, recipe=recipe), 1000, 100)
    assert row_name(args["loss"]) == row and args.keys() == {*DEFAULTS, "loss", "dataset", "loss_args", "explicit"}
    build_loss(args["loss"], 10, 8, args["loss_args"])


def test_every_key_of_a_recipe_belongs_to_a_loss_and_a_data_set():
    for recipe, rows in RECIPES.items():
        for key in rows:
            row, _, dataset = key.partition("@")
            assert row == "*" or row in ROWS, f"{recipe}, {key}: {row} is no row of losses.ROWS"
            assert dataset in ("", *DATASETS), f"{recipe}, {key}: {dataset} is no data set of data.DATASETS"


def test_an_explicit_flag_wins_over_the_recipe_and_the_recipe_over_the_defaults():
    assert run_of()["lr"] == 3.5e-4
    assert run_of(recipe="published")["lr"] == 3e-4
    assert run_of(recipe="published", lr=0.1)["lr"] == 0.1
    assert run_of("multi_similarity", recipe="published")["lr"] == 1e-4
    assert run_of("multi_similarity", recipe="published", loss_args=["beta=3"])["loss_args"] == [
        "multi_similarity.beta=10.0", "multi_similarity.base=1.0", "beta=3"]  # fmt: skip


def test_controlled_differs_between_losses_in_their_own_numbers_only():
    """Same batches, optimizer, schedule, epochs and augmentation for every loss."""
    for key, values in RECIPES["controlled"].items():
        if not key.startswith("*"):
            others = ", ".join(values.keys() - {*OWN})
            assert not others, (
                f"the row {key!r} of the controlled recipe sets {others}, which must be the same for all losses, since "
                f"a difference between two losses would otherwise be one of {others}: a row may set {', '.join(OWN)}"
            )
    for dataset in DATASETS:
        plain = run_of("softmax", dataset)
        for row in ROWS:
            args = run_of(row, dataset)
            for key in DEFAULTS.keys() - {*OWN}:
                assert args[key] == plain[key], f"{row} on {dataset}: {key} is {args[key]}, and {plain[key]} of softmax"
    args = run_of()
    assert (args["sampler"], args["p"], args["k"], args["random_crop"]) == ("pk", 16, 4, False)
    assert args["milestones"] == [20, 40] and args["epochs"] == 60


def test_published_settings():
    """Of the published comparison: batch, sampler, milestones, learning rate."""
    expected = {
        "softmax": (32, "random", [20, 40], 3e-4),
        "triplet": (64, "pk", [5, 20, 40], 3e-4),
        "softmax+triplet": (32, "random", [20, 40], 3e-4),
        "softmax+center": (32, "random", [20, 40], 3e-4),
        "npair": (64, "pk", [20, 40], 3e-4),
        "histogram": (64, "pk", [2, 20, 40], 3e-4),
        "focal": (32, "random", [20, 40], 3e-4),
        "multi_similarity": (160, "pk", [20, 40], 1e-4),
        "sphereface_m1": (32, "random", [20, 40], 3e-4),
        "sphereface": (32, "random", [20, 40], 3e-4),
        "cosface": (32, "random", [5, 20, 40], 3e-4),
        "arcface": (32, "random", [5, 20, 40], 3e-4),
    }
    assert tuple(expected) == TWELVE
    for row, wanted in expected.items():
        args = run_of(row, recipe="published")
        batch = args["batch_size"] or args["p"] * args["k"]
        assert (batch, args["sampler"], args["milestones"], args["lr"]) == wanted, row
        assert args["random_crop"] and args["epochs"] == 60 and args["seed"] == 1 and args["weight_decay"] == 5e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_generated_pedestrians_need_no_flags(recipe):
    """The quick setting: a small network, small images, few epochs; elsewhere the recipe's own."""
    quick = {"arch": "resnet18", "weights": "none", "height": 128, "width": 64, "epochs": 5}
    quick["milestones"] = [2, 3] if recipe == "tricks" else [4]
    for row in ROWS:
        args, elsewhere = (run_of(row, dataset, recipe=recipe) for dataset in ("synthetic", "market"))
        assert {key: args[key] for key in quick} == quick, row
        assert (elsewhere["arch"], elsewhere["height"], elsewhere["epochs"]) == ("resnet50", 256, 60)
        assert args["warmup"] == pytest.approx(elsewhere["warmup"] / 12, abs=1e-4)
        for key in DEFAULTS.keys() - {*quick, *OWN, "warmup"}:
            assert args[key] == elsewhere[key], f"{row}: {key}"
    args = run_of(dataset="synthetic", recipe=recipe, epochs=60, arch="resnet50", width=128)
    assert (args["epochs"], args["arch"], args["width"], args["height"]) == (60, "resnet50", 128, 128)


def test_center_weights_by_data_set():
    assert run_of("softmax+center", recipe="published")["loss"] == "softmax+6e-05*center"
    assert run_of("softmax+center", "duke", recipe="published")["loss"] == "softmax+2e-05*center"
    assert run_of("softmax+0.1*center")["loss"] == "softmax+0.1*center"  # a written weight stays


def test_unknown_recipe():
    with pytest.raises(ValueError, match="unknown recipe 'mine'; known: controlled, published, tricks"):
        recipe_values("mine", "softmax", "market")


# --------------------------------------------------------------------------------------------- flags that become a dict


def test_a_number_by_steps_is_divided_once_they_are_known():
    """398 over the number of steps, whatever data set and batch: lambda reaches 5 half-way. By hand: 398 / 1000."""
    args = run_of("sphereface")
    assert args["loss_args_by_steps"] == {"sphereface.lambda_gamma": 398} and args["loss_args"] == []
    counted = work_out(args, 1000, 100)
    assert counted["loss_args"] == ["sphereface.lambda_gamma=0.398"] and "loss_args_by_steps" not in counted
    loss_fn = build_loss("sphereface", 10, 8, counted["loss_args"])
    assert float(loss_fn.annealing(500)) == pytest.approx(5.0)
    assert float(loss_fn.annealing(250)) > 9 and float(loss_fn.annealing(1000)) == 5
    assert work_out(args, 300, 100)["loss_args"] == [f"sphereface.lambda_gamma={398 / 300!r}"]
    assert work_out(args, 0, 100)["loss_args"] == ["sphereface.lambda_gamma=398.0"]  # an untrained network


def test_a_scale_follows_the_number_of_people():
    """CosFace's lower bound by hand: of 20 people 19 / 20 * ln(19 * 999) = 9.36, of 751 13.51; a typed scale wins."""
    assert least_scale(20) == pytest.approx(9.3586, abs=1e-4) and least_scale(751) == pytest.approx(13.5088, abs=1e-4)
    for loss in ("cosface", "arcface", "subcenter_arcface", "adaface"):
        for people, scale in ((20, 9.4), (751, 13.5)):
            assert build_loss(loss, people, 8, work_out(run_of(loss, "folder"), 1, people)["loss_args"]).scale == scale
        typed_scale = work_out(run_of(loss, "folder", loss_args=["scale=30"]), 1, 20)
        assert build_loss(loss, 20, 8, typed_scale["loss_args"]).scale == 30
    line, note = show_flags(run_of("arcface", "folder")).splitlines()
    assert note == "# arcface.scale=1.0 x the least scale for the number of people" and "arcface.scale" not in line


@pytest.mark.parametrize("pair", ["lambda_gamma=0.5", "sphereface.lambda_gamma=0.5"])
def test_an_explicit_number_wins_over_one_by_steps(pair):
    args = work_out(run_of("sphereface", loss_args=[pair]), 1000, 100)
    assert build_loss("sphereface", 10, 8, args["loss_args"]).lambda_gamma == 0.5
    again = work_out(new_run(typed(show_flags(run_of("sphereface", loss_args=[pair])))), 1000, 100)
    assert build_loss("sphereface", 10, 8, again["loss_args"]).lambda_gamma == 0.5


def test_milestones_follow_the_epochs():
    assert run_of(epochs=12)["milestones"] == [4, 8]
    assert run_of(epochs=12, milestones=[3])["milestones"] == [3]
    assert run_of(epochs=12, milestones=[])["milestones"] == []
    assert run_of(epochs=12, recipe="published")["milestones"] == [20, 40]
    assert [train.learning_rate_factor(epoch, [2, 3]) for epoch in range(4)] == pytest.approx([1, 1, 0.1, 0.01])


def test_p_and_k_belong_to_the_pk_sampler():
    assert run_of(p=8)["p"] == 8 and run_of(p=8)["batch_size"] is None
    assert run_of(sampler="random")["batch_size"] == 64 and run_of(sampler="random", batch_size=9)["batch_size"] == 9
    for flag in ("p", "k"):
        with pytest.raises(ValueError, match="--p and --k belong to --sampler pk"):
            run_of(sampler="random", **{flag: 8})
    with pytest.raises(ValueError, match="--batch-size belongs to --sampler random"):
        run_of(batch_size=8)


@pytest.mark.parametrize(
    "explicit, message",
    [
        ({"loss": "arcfac"}, "arcface"),
        ({"dataset": "marked"}, "market"),
        ({"dataset": "market+marked"}, "market"),
        ({"synthetic_ids": 9}, "--synthetic-ids belongs to --dataset synthetic, not to market"),
        ({"loss_args": ["smooth=1"]}, "smooth"),
        ({"p": 1, "k": 1}, "at least 2 images"),
    ],
)
def test_what_clashes_is_refused(explicit, message):
    with pytest.raises(ValueError, match=message):
        run_of(**explicit)


def test_a_switch_that_can_be_turned_off_is_typed_so():
    """One missing from OPPOSITES would be trained without its --no-..., in a folder that nobody looks for."""
    text = build_parser().format_help()
    assert {key for key in DEFAULTS if f"--no-{key.replace('_', '-')}" in text} == {*OPPOSITES}


def test_the_flags_that_change_no_number():
    assert {*FREE} >= {"data_dir", "workers", "cache", "device", "eval_every", "save_every"}
    assert {*FREE, *SCORING} <= DEFAULTS.keys() and not {*FREE} & {*SCORING}


# ----------------------------------------------------------------------------------------------------- show, type, name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dataset", ["duke", "synthetic"])
def test_show_recipe_prints_flags_that_give_the_same_run(recipe, dataset, capsys):
    """What it prints can be typed: parsed again, it gives the same flags and the same loss."""
    for row in ROWS:
        train.main(["--loss", row, "--dataset", dataset, "--recipe", recipe, "--show-recipe"])
        again = work_out(new_run(typed(capsys.readouterr().out)), 500, 100)
        args = work_out(run_of(row, dataset, recipe=recipe), 500, 100)
        for key in args.keys() - {"recipe", "loss_args", "explicit"}:
            assert again[key] == args[key], f"{row}: {key}"
        losses = [build_loss(flags["loss"], 10, 8, flags["loss_args"]) for flags in (args, again)]
        assert values_of(losses[0]) == values_of(losses[1]), row


@pytest.mark.parametrize("row", ROWS)
def test_show_recipe_prints_every_argument_of_the_loss(row):
    """Defaults included, and of a sum those of each term; what depends on the steps in a line of its own."""
    line, *notes = show_flags(run_of(row)).splitlines()
    shown = {pair.partition("=")[0] for pair in typed(line).get("loss_args", [])}
    shown |= {note.split("=")[0].removeprefix("# ") for note in notes}
    names = [name for name, _ in parse_expression(row)]
    assert shown == {f"{name}.{key}" for name in names for key in settable_arguments(name)}


def test_show_recipe_by_hand():
    shown = show_flags(run_of("arcface", loss_args=["scale=30"], workers=3, amp=True))
    assert shown.startswith(
        "--loss arcface --dataset market --loss-args arcface.scale=30.0 arcface.margin=0.1 --eval-on"
    )
    assert all(part in shown for part in ("--sampler pk --p 16 --k 4", "--amp", "--lr 0.00035 --loss-lr 0.00035"))
    assert not {"--recipe", "--compile", "--tf32", "--no-tf32"} & {*shown.split()}
    assert not {f"--{key.replace('_', '-')}" for key in FREE} & {*shown.split()}  # of this machine
    line, note = show_flags(run_of("sphereface")).splitlines()
    assert note == "# sphereface.lambda_gamma=398 / number of training steps" and "lambda_gamma" not in line


def test_show_recipe_of_a_run_that_began(tmp_path, capsys):
    """Flags of its args.json, the worked-out loss arguments among them: they can be typed."""
    explicit = {"loss": "sphereface", "dataset": "market", "epochs": 7}
    args = {**work_out(new_run(explicit), 200, 100), "environment": {}, "num_classes": 5}
    (tmp_path / "args.json").write_text(json.dumps(args))
    train.main(["--resume", "--run-dir", str(tmp_path), "--show-recipe"])
    again = typed(capsys.readouterr().out)
    assert "sphereface.lambda_gamma=1.99" in again["loss_args"] and again["epochs"] == 7


def test_command_line_quotes_what_a_shell_would_split():
    flags = {"data_dir": "my data", "amp": True, "compile": False, "milestones": [1, 2], "loss_lr": None}
    assert command_line(flags) == "--data-dir 'my data' --amp --milestones 1 2"
    assert command_line({"random_crop": False, "tf32": False, "milestones": []}) == (
        "--no-random-crop --no-tf32 --milestones")  # fmt: skip


@pytest.mark.parametrize(
    "explicit, suffix",
    [
        ({}, ""),
        ({"recipe": "controlled"}, ""),
        ({"recipe": "published"}, "_published"),
        ({"epochs": 20, "amp": True}, "_epochs-20_amp"),
        ({"amp": True, "epochs": 20}, "_epochs-20_amp"),  # in the order of the flags, not in that of typing
        ({"milestones": [4, 8], "p": 8}, "_milestones-4-8_p-8"),
        ({"loss_args": ["margin=0.2"]}, "_loss-args-margin=0.2"),
        ({"random_crop": False, "tf32": True}, "_random-crop-False_tf32"),
        ({key: DEFAULTS[key] for key in FREE}, ""),
        ({key: DEFAULTS[key] for key in FREE} | {"compile": True}, "_compile"),
    ],
    ids=str,
)
def test_run_names_tell_what_may_change_a_number(explicit, suffix):
    assert run_name(run_of("arcface", seed=3, **explicit)) == f"market_arcface_s3{suffix}"


def test_run_names_of_sums_and_unions():
    assert run_name(run_of("softmax+0.5*triplet", "market+duke")) == "market+duke_softmax+0.5xtriplet_s0"
    assert run_name(run_of("softmax+center")) == "market_softmax+center_s0"  # without the recipe's weight


def test_unwieldy_flags_give_names_that_differ_and_can_be_files():
    weights = ("/a/b.pth", "/a-b.pth", "a b.pth", "x" * 300 + "1", "x" * 300 + "2")
    names = {run_name(run_of(weights=name)) for name in weights}
    assert len(names) == 5
    assert all(not {*"/\\ :*?"} & {*name} and len(name) <= 120 for name in names)
