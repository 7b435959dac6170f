"""Recipes: every row is understood, an explicit flag wins, the published settings are the published ones."""

import json
import shlex

import pytest

import train
from losses import TWELVE, build_loss, row_name
from utils.recipes import RECIPES, command_line, recipe_defaults, resolve_loss_args


def resolve(**explicit):
    return train.resolve_flags({"dataset": "market", **explicit})


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dataset", ["market", "duke", "synthetic"])
@pytest.mark.parametrize("row", TWELVE)
def test_every_row_gives_flags_that_exist_and_a_loss_that_can_be_built(recipe, dataset, row):
    defaults = recipe_defaults(recipe, row, dataset)
    assert set(defaults) - {"loss_args", "loss_weights"} <= set(train.DEFAULTS)
    args = resolve(loss=row, recipe=recipe, dataset=dataset)
    assert row_name(args["loss"]) == row
    build_loss(args["loss"], 10, 8, resolve_loss_args(args["loss_args"], 1000))


def test_every_row_belongs_to_a_loss_and_a_data_set():
    for rows in RECIPES.values():
        for key in rows:
            row, _, dataset = key.partition("@")
            assert row in ("*", *TWELVE) and dataset in ("", "market", "duke", "synthetic"), key


def test_an_explicit_flag_wins_over_the_recipe_and_the_recipe_over_the_defaults():
    assert resolve(loss="softmax")["lr"] == 3.5e-4
    assert resolve(loss="softmax", recipe="published")["lr"] == 3e-4
    assert resolve(loss="softmax", recipe="published", lr=0.1)["lr"] == 0.1
    assert resolve(loss="multi_similarity", recipe="published")["lr"] == 1e-4


def test_controlled_differs_between_losses_in_their_own_numbers_only():
    """Same batches, optimizer, schedule, epochs and augmentation for all twelve."""
    own = ("loss", "loss_args", "loss_lr")
    shared = [{k: v for k, v in resolve(loss=row).items() if k not in own} for row in TWELVE]
    assert all(other == shared[0] for other in shared[1:])
    assert shared[0]["sampler"] == "pk" and (shared[0]["p"], shared[0]["k"]) == (16, 4)
    assert shared[0]["milestones"] == [20, 40] and shared[0]["epochs"] == 60 and not shared[0]["random_crop"]


def test_published_settings():
    """RECIPES: batch, sampler, milestones, learning rate."""
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
    for row, wanted in expected.items():
        args = resolve(loss=row, recipe="published")
        batch = args["batch_size"] or args["p"] * args["k"]
        assert (batch, args["sampler"], args["milestones"], args["lr"]) == wanted, row
        assert args["random_crop"] and args["epochs"] == 60 and args["seed"] == 1 and args["weight_decay"] == 5e-4


def test_center_weights_by_data_set():
    assert resolve(loss="softmax+center", recipe="published")["loss"] == "softmax+6e-05*center"
    assert resolve(loss="softmax+center", recipe="published", dataset="duke")["loss"] == "softmax+2e-05*center"
    assert resolve(loss="softmax+0.1*center")["loss"] == "softmax+0.1*center"  # a written weight stays


def test_sphereface_reaches_lambda_min_half_way():
    """1000 steps: lambda(500) = 5, and well above before."""
    loss_args = resolve_loss_args(recipe_defaults("controlled", "sphereface", "market")["loss_args"], 1000)
    loss_fn = build_loss("sphereface", 10, 8, loss_args)
    assert float(loss_fn.annealing(500)) == pytest.approx(5.0)
    assert float(loss_fn.annealing(250)) > 9 and float(loss_fn.annealing(1000)) == 5


def test_milestones_follow_the_epochs():
    assert resolve(loss="softmax", epochs=12)["milestones"] == [4, 8]
    assert resolve(loss="softmax", epochs=12, milestones=[3])["milestones"] == [3]
    assert [train.learning_rate_factor(epoch, [2, 3]) for epoch in range(4)] == pytest.approx([1, 1, 0.1, 0.01])


def test_show_recipe_prints_flags_that_give_the_same_run(capsys):
    """What it prints can be typed: parsed again, it resolves to the same flags."""
    for recipe in RECIPES:
        for row in TWELVE:
            train.main(["--loss", row, "--dataset", "duke", "--recipe", recipe, "--show-recipe"])
            printed = shlex.split(capsys.readouterr().out, comments=True)
            again = vars(train.build_parser().parse_args(printed))
            given = dict(pair.split("=") for pair in again.pop("loss_args", []))
            args = resolve(loss=row, dataset="duke", recipe=recipe)
            for key, value in again.items():
                assert value == args[key], key
            for key, value in args["loss_args"].items():
                assert key in given and float(given[key]) == value or str(value).endswith("/steps")


def test_unknown_recipe():
    with pytest.raises(ValueError, match="controlled, published"):
        recipe_defaults("mine", "softmax", "market")


def test_command_line_quotes_what_a_shell_would_split():
    flags = {"data_dir": "my data", "amp": True, "compile": False, "milestones": [1, 2], "loss_lr": None}
    assert command_line(flags) == "--data-dir 'my data' --amp --milestones 1 2"
    assert command_line({"random_crop": False}) == "--no-random-crop"


def test_show_recipe_of_a_run_that_began(tmp_path, capsys):
    """Flags of its args.json, the worked-out loss arguments among them: they can be typed."""
    explicit = {"loss": "sphereface", "dataset": "market", "epochs": 7}
    args = {**train.resolve_flags(explicit), "loss_args": ["sphereface.lambda_gamma=0.5", "margin=3"]}
    args |= {"explicit": explicit, "environment": {}, "num_classes": 5}
    (tmp_path / "args.json").write_text(json.dumps(args))
    train.main(["--resume", "--run-dir", str(tmp_path), "--show-recipe"])
    again = vars(train.build_parser().parse_args(shlex.split(capsys.readouterr().out)))
    assert again["loss_args"] == ["sphereface.lambda_gamma=0.5", "margin=3"] and again["epochs"] == 7


def test_p_and_k_belong_to_the_pk_sampler():
    assert resolve(loss="softmax", p=8)["p"] == 8
    for flag in ("p", "k"):
        with pytest.raises(ValueError, match="--p and --k belong to --sampler pk"):
            resolve(loss="softmax", sampler="random", **{flag: 8})
