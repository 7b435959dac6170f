"""Several processes give the numbers of one, and micro-batches those of the whole batch; what happens if one fails.

Two and three gloo processes are begun once each and go through everything that needs no torchrun; what they found is
compared here with what one process finds. Batch normalisation is frozen where numbers must be equal. Where it is not,
its statistics are per process, as they are per part with micro-batches: there N processes are compared with N parts.
"""

import functools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from conftest import QUICK, small_model, small_models
from torch import nn

import evaluate
import train
from data.images import TrainingImages
from data.market1501 import market1501
from losses import LOSSES, build_loss
from models.backbone import GlobalAveragePool
from utils import distributed
from utils.features import Features
from utils.flags import DEFAULTS, new_run
from utils.plan import commands
from utils.ranking import rank_metrics
from utils.runs import describe
from utils.seed import mix_seed

pytestmark = [pytest.mark.filterwarnings("ignore:Market-1501 in"), pytest.mark.filterwarnings("ignore:Named tensors")]
ROOT = Path(__file__).resolve().parent.parent
EXPRESSIONS = [*LOSSES, "softmax+triplet", "softmax+0.5*center"]
# Everybody in several shares: two of six images or three of four; four people twice or more, two once.
LABELS = torch.tensor([0, 1, 0, 2, 0, 1, 3, 0, 2, 1, 0, 4])
SIZE = dict(height=32, width=16, device=torch.device("cpu"), workers=0)


# ------------------------------------------------------------------------------------- what one or several processes do


def small_network(dropout=0.0):
    layers = nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(16, 8, 3)
    network = nn.Sequential(*layers, GlobalAveragePool(), nn.Flatten())
    network[1].running_mean.uniform_(-0.1, 0.1)
    network[1].running_var.uniform_(0.5, 1)
    return network


def train_steps(expression, dtype=torch.float64, micro_batches=1, steps=3):
    """Everything that three steps of SGD change (Adam would not notice a factor), and the first step's gradients."""
    torch.manual_seed(0)
    model, loss_fn = small_network().to(dtype).eval(), build_loss(expression, 6, 8).to(dtype)
    forward, whole_loss = distributed.parallel(model), distributed.parallel(loss_fn)
    parameters = [*model.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    batches = torch.rand(steps, len(LABELS), 3, 12, 8, dtype=torch.float64).to(dtype)
    rows = distributed.share(len(LABELS))
    losses, first = [], None
    for images in batches:
        optimizer.zero_grad()
        losses.append(train.backward_step(forward, whole_loss, images[rows], LABELS, micro_batches))
        first = first or [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
    state = {**model.state_dict(), **{f"loss.{key}": value for key, value in loss_fn.state_dict().items()}}
    return {"loss": torch.stack(losses), **{key: value.clone() for key, value in state.items()}}, first


alone = functools.cache(train_steps)  # what one process finds


def wrong_order(embeddings):
    return distributed._Gather.apply(embeddings).roll(len(embeddings), 0)


def without_gradient(embeddings):
    """Others' rows and its own arrive, its own with their gradient: but nobody sees to the sum."""
    whole = distributed._Gather.apply(embeddings.detach())
    whole[distributed.share(len(whole))] = embeddings
    return whole


def counted_twice(embeddings):
    whole = distributed._Gather.apply(embeddings)
    whole.register_hook(lambda gradient: gradient * distributed.world_size())
    return whole


FAULTS = {function.__name__: function for function in (wrong_order, without_gradient, counted_twice)}


def scores():
    """Of three queries a process and one more, and of as many as two processes have, in float64 and float32."""
    found = []
    for count in (10, 2, 1):
        for dtype in (torch.float64, torch.float32):
            found.append(evaluate.score(random_features(count).to(dtype)))
    return found


class RandomFeatures(Features):
    def to(self, dtype):
        return self._replace(query=self.query.to(dtype), gallery=self.gallery.to(dtype))


def random_features(count, gallery=61):
    draw = torch.Generator().manual_seed(count)
    people = torch.randn(7, 16, generator=draw, dtype=torch.float64)
    pids, camids = ([torch.randint(high, (n,), generator=draw) for n in (count, gallery)] for high in (7, 3))
    tables = [people[p] + torch.randn(len(p), 16, generator=draw, dtype=torch.float64) for p in pids]
    ours = [table for pair in zip(tables, pids, camids, strict=True) for table in pair]
    names = [field for which in ("query", "gallery") for field in (which, f"{which}_pids", f"{which}_camids")]
    return RandomFeatures(**dict(zip(names, ours, strict=True)), query_paths=None, gallery_paths=None)


def outcome(function, *arguments):
    """The sentence that an error says, or the exit code."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    except SystemExit as stopped:
        return stopped.code
    return None


def main(*flags):
    return outcome(train.main, [str(flag) for flag in flags])


def flags_of(folder, data, *more):
    return ["--loss", "softmax+center", "--dataset", "market", "--data-dir", data, *QUICK, "--p", 4, "--k", 4,
            "--epochs", 3, "--run-dir", folder, *more]  # fmt: skip


def everything(folder, data):
    """What one of two or three processes finds."""
    number, count = distributed.rank(), distributed.world_size()
    found = {"steps": {name: train_steps(name) for name in EXPRESSIONS}}
    found["float32"] = {name: train_steps(name, torch.float32, steps=1)[1] for name in EXPRESSIONS}
    found["parts"] = {name: train_steps(name, micro_batches=2)[0] for name in EXPRESSIONS}
    right, found["faults"] = distributed.gather, {}
    for fault in FAULTS if count == 3 else []:
        distributed.gather = FAULTS[fault]
        found["faults"][fault] = {name: train_steps(name, steps=1)[0] for name in EXPRESSIONS}
    distributed.gather = right
    found["scores"] = scores()
    paths = [record.path for record in market1501(data, check_counts=False).query]
    torch.manual_seed(0)
    network = small_model("resnet18")
    found["embeddings"] = [evaluate.embed(network, paths[:total], **SIZE) for total in (len(paths), 7, count, 1)]
    images_of = TrainingImages(paths, 32, 16, torch.device("cpu"), True, workers=0)
    order = torch.arange(12).view(2, 6)
    mine = images_of.batches(order, 0, 1, distributed.share(6))
    found["pixels"] = torch.stack([distributed.gather_rows(images, 6) for images in mine])
    found["agreed"] = distributed.largest(10 + number)
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(number)
    distributed.average_buffers(norm)
    found["averaged"] = norm.running_mean
    with small_models():
        found["no share"] = main(*flags_of(folder / f"{count}", data, "--p", 5, "--k", 5))
        if count == 2:
            found |= trainings(folder, data, number)
    return found


def trainings(folder, data, number):
    """train.main in two processes: whole, stopped by a signal that one of them gets, resumed; misunderstandings."""
    found = {"whole": main(*flags_of(folder / "whole", data))}
    right, calls = train.backward_step, []

    def interrupted(*arguments, **how):
        calls.append(torch.initial_seed())
        if len(calls) == 5 and number == 1:  # in the second of three steps of the second epoch
            signal.raise_signal(signal.SIGTERM)
        return right(*arguments, **how)

    train.backward_step = interrupted
    found["stopped"], found["seeds"] = main(*flags_of(folder / "run", data)), calls
    train.backward_step = right
    if number == 0:
        shutil.copytree(folder / "run", folder / "elsewhere")
    distributed.largest(0)
    found["resumed"] = main("--resume", "--run-dir", folder / "run")
    begun = folder / ("whole" if number else "nowhere")
    found["evaluated"] = outcome(evaluate.main, ["--run", str(folder / "whole")])
    found["resumed by one"] = main(*flags_of(begun, data, "--resume"))
    found["other flags"] = main(*flags_of(folder / "flags", data, "--seed", number))
    found["other images"] = main(*flags_of(folder / "images", folder / "fewer" if number else data))
    found["too many parts"] = main(*flags_of(folder / "parts", data, "--micro-batches", 5))
    published = ["--loss", "softmax", "--dataset", "market", "--data-dir", data, *QUICK, "--recipe", "published"]
    found["published"] = main(*published, "--epochs", 0, "--run-dir", folder / "published")
    found["sync"] = main(*flags_of(folder / "sync", data, "--sync-bn"))
    return found


def one_of_several(number, count, port, folder, data):
    as_by_torchrun(number, count, port)
    said = open(folder / f"said_{count}_{number}.txt", "w")
    sys.stdout = sys.stderr = said
    with distributed.processes():
        torch.save(everything(folder, data), folder / f"{count}_{number}.pt")
    said.close()


def one_of_two_scripts(number, port, script, flags, folder):
    """The script itself; its stderr, and its exit code as the last line, are in a file."""
    as_by_torchrun(number, 2, port)
    with open(folder / f"error_{number}.txt", "w") as error:
        sys.argv, sys.stderr = [script, *map(str, flags)], error
        sys.__stdout__, sys.__stderr__ = sys.stdout, error
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
            if isinstance(code, str):  # as Python does: the sentence, and 1
                print(code, file=sys.stderr)
                code = 1
            error.write(f"{code}\n")


def as_by_torchrun(number, count, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), "MASTER_PORT": str(port),
                   "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip


def start(function, arguments, count):
    """torch is imported once, by the server that the processes are forks of."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "torchvision"])
    torch.multiprocessing.start_processes(function, arguments, nprocs=count, start_method="forkserver")


def two_scripts(folder, script, *flags):
    """The exit codes of the script in two processes, and what they said on stderr."""
    start(one_of_two_scripts, (free_port(), script, flags, folder), 2)
    said = [(folder / f"error_{number}.txt").read_text().splitlines() for number in range(2)]
    said = [[line for line in lines if "TCPStore" not in line] for lines in said]  # torch's, if one ends first
    return [int(lines[-1]) for lines in said], [line for lines in said for line in lines[:-1]]


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_market):
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(tiny_market, folder / "fewer")
    next((folder / "fewer").glob("bounding_box_train/*")).unlink()
    return folder


@pytest.fixture(scope="module")
def several(folder, tiny_market):
    """Number of processes -> what each of them found."""
    found = {}
    for count in (2, 3):
        start(one_of_several, (count, free_port(), folder, tiny_market), count)
        found[count] = [torch.load(folder / f"{count}_{number}.pt", weights_only=False) for number in range(count)]
    return found


# ------------------------------------------------------------------------------------------------------------- equality


def differences(found, expected):
    assert found.keys() == expected.keys()
    return {key: (found[key].double() - value.double()).abs().max().item() for key, value in expected.items()}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_processes_are_one(several, count, expression):
    """Losses, weights, class weights and buffers after three steps; in float32 the first step's gradients."""
    expected, first = alone(expression)
    assert max(gradient.abs().max() for gradient in first) > 1e-6  # something is learned
    single = alone(expression, torch.float32, steps=1)[1]
    for found in several[count]:
        assert max(differences(found["steps"][expression][0], expected).values()) < 1e-10
        for gradient, wanted in zip(found["float32"][expression], single, strict=True):
            assert (gradient - wanted).abs().max() <= 1e-5 * max(each.abs().max() for each in single)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_gather_is_noticed(several, fault):
    """By every loss, in every process."""
    for found in several[3]:
        for expression in EXPRESSIONS:
            expected = alone(expression, steps=1)[0]
            assert max(differences(found["faults"][fault][expression], expected).values()) > 1e-8


@pytest.mark.parametrize("micro_batches", [2, 5, 12])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_micro_batches_are_the_batch(expression, micro_batches):
    expected = alone(expression)[0]
    assert max(differences(train_steps(expression, micro_batches=micro_batches)[0], expected).values()) < 1e-10


@pytest.mark.parametrize("count", [2, 3])
def test_micro_batches_in_processes_are_the_batch(several, count):
    for found in several[count]:
        for expression in EXPRESSIONS:
            assert max(differences(found["parts"][expression], alone(expression)[0]).values()) < 1e-10


def test_micro_batches_draw_dropout_once_and_move_statistics_once_per_part():
    torch.manual_seed(0)
    model, loss_fn, images = small_network(dropout=0.5).train(), build_loss("softmax", 6, 8), torch.rand(12, 3, 12, 8)
    by_hand = small_network()[1].train()
    by_hand.load_state_dict(model[1].state_dict())
    for part in images.tensor_split(3):
        by_hand(model[0](part))
    before, seen, statistics = model[1].running_mean.clone(), [], []
    model.register_forward_hook(lambda *arguments: seen.append(arguments[-1].detach()))
    model[1].register_forward_hook(lambda *_: statistics.append(model[1].running_mean.clone()))
    train.backward_step(model, loss_fn, images, LABELS, micro_batches=3)
    assert len(seen) == 6 and all(torch.equal(*pair) for pair in zip(seen[:3], seen[3:], strict=True))
    assert all(torch.equal(before, moved) for moved in statistics[:3])
    assert torch.equal(statistics[5], by_hand.running_mean) and torch.equal(model[1].running_var, by_hand.running_var)
    assert int(by_hand.num_batches_tracked) == int(model[1].num_batches_tracked) == 3
    assert not torch.equal(seen[0], model(images[:4]))  # dropout is at work


@pytest.mark.parametrize("count", [2, 3])
def test_shares_of_scoring_and_of_a_batch_and_means_of_statistics(several, count, tiny_market):
    """18, 7, as many images as processes, and one: embeddings in order; metrics; pixels of a batch."""
    paths = [record.path for record in market1501(tiny_market, check_counts=False).query]
    torch.manual_seed(0)
    network = small_model("resnet18")
    expected = [evaluate.embed(network, paths[:total], **SIZE) for total in (len(paths), 7, count, 1)]
    with pytest.raises(ValueError, match="no images to embed"):
        evaluate.embed(network, [], **SIZE)
    images_of = TrainingImages(paths, 32, 16, torch.device("cpu"), True, workers=0)
    pixels = torch.stack(list(images_of.batches(torch.arange(12).view(2, 6), 0, 1)))
    for found in several[count]:
        for embeddings, wanted in zip(found["embeddings"], expected, strict=True):
            torch.testing.assert_close(embeddings, wanted, rtol=0, atol=1e-5)
        for position, (metrics, wanted) in enumerate(zip(found["scores"], scores(), strict=True)):
            assert metrics == (pytest.approx(wanted, abs=1e-5) if position % 2 else wanted)
        assert torch.equal(found["pixels"], pixels)
        assert found["agreed"] == 10 + count - 1
        assert found["averaged"].tolist() == [(count - 1) / 2] * 2
    features = random_features(10)
    assert scores()[0] == rank_metrics(*features[:6]) and 0 < scores()[0]["mAP"] < 1


# ------------------------------------------------------------------------------------------------------ train.py itself


def read_log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line.keys() - {"seconds", "images_per_second"}} for line in lines]


def read_state(folder):
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    return {**checkpoint["model"], **{f"loss.{key}": value for key, value in checkpoint["loss"].items()}}


def test_evaluation_by_two_processes_is_that_of_one(several, folder):
    """With training's own scoring at the end."""
    path = folder / "whole" / "evaluation_market_cosine.json"
    together, result = (json.loads((folder / "whole" / name).read_text()) for name in (path.name, "result.json"))
    path.unlink()
    with small_models():
        evaluate.main(["--run", str(folder / "whole")])
    by_one = json.loads(path.read_text())
    assert [found["evaluated"] for found in several[2]] == [None, None]
    for key in evaluate.METRICS:
        assert by_one[key] == pytest.approx(together[key], abs=1e-5) == pytest.approx(result[key], abs=1e-5)


def test_a_signal_that_one_process_gets_stops_all_after_the_same_step(several, folder):
    assert [found["stopped"] for found in several[2]] == [128 + signal.SIGTERM] * 2
    assert [len(found["seeds"]) for found in several[2]] == [5, 5]
    assert "goes on from epoch 2" in (folder / "said_2_0.txt").read_text()


def test_dropout_of_each_process_has_draws_of_its_own(several):
    """Otherwise the first image of each would always lose the same features; process 0 draws as one alone does."""
    one, two = (found["seeds"] for found in several[2])
    assert one == [mix_seed(0, epoch) for epoch in (0, 0, 0, 1, 1)] and not {*one} & {*two}
    assert two[0] == two[2] != two[3]


def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one(several, folder):
    """Bit for bit: weights, running statistics, centers, log."""
    assert [found[key] for found in several[2] for key in ("whole", "resumed")] == [None] * 4
    whole, resumed = read_state(folder / "whole"), read_state(folder / "run")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert read_log(folder / "whole") == read_log(folder / "run")
    assert (folder / "run" / "result.json").exists()


def test_a_resume_with_another_number_of_processes_says_so(several, folder, capsys):
    with small_models():
        assert main("--resume", "--run-dir", folder / "elsewhere") is None
    said = capsys.readouterr().out
    assert re.search("began with .*processes 2.* and goes on with .*processes 1.*: not bit for bit", said)
    assert len(read_log(folder / "elsewhere")) == 3


def test_batch_normalisation_of_two_processes_is_that_of_two_parts(several, folder, tiny_market, tmp_path):
    """The same statistics in every step: the same losses."""
    with small_models():
        main(*flags_of(tmp_path / "parts", tiny_market, "--micro-batches", 2))
        main(*flags_of(tmp_path / "plain", tiny_market))
    losses = {at: [line["loss"] for line in read_log(at)] for at in (folder / "whole", *tmp_path.iterdir())}
    assert losses[folder / "whole"] == pytest.approx(losses[tmp_path / "parts"], rel=1e-4)
    assert losses[folder / "whole"] != pytest.approx(losses[tmp_path / "plain"], rel=1e-4)


def test_the_parts_of_the_published_recipe_are_shared_by_the_processes(several, folder):
    """Its four are those of a whole batch: on four GPUs with torchrun none is left to cut."""
    assert [found["published"] for found in several[2]] == [None, None]
    assert json.loads((folder / "published" / "args.json").read_text())["micro_batches"] == 2
    assert "--micro-batches 2 in each of 2 processes" in (folder / "said_2_0.txt").read_text()


def test_rank_0_alone_speaks(several, folder):
    assert (folder / "said_2_1.txt").read_text() == ""
    lines = (folder / "said_2_0.txt").read_text().splitlines()
    assert sum(line.startswith("epoch 3/3") for line in lines) == 2  # of the whole run and of the resumed one


def test_misunderstandings_are_one_sentence(several, folder):
    expected = {"resumed by one": "what --resume finds in .* differs between the processes",
                "other flags": "the set of flags differs between the processes",
                "other images": "the list of training images differs between the processes: begin all by one command",
                "too many parts": "of 16 images 2 processes with 5 --micro-batches would see fewer than 2 at a time",
                "sync": "--sync-bn works on GPUs only: leave it out",
                "no share": "2 processes can't share a batch of 25 images equally: other --p"}  # fmt: skip
    for found in several[2]:
        for case, sentence in expected.items():
            assert re.match(sentence, found[case]), case
    assert not any((folder / name).exists() for name in ("nowhere", "flags", "images", "parts", "sync"))


# ------------------------------------------------------------------------------------------------------------- torchrun


def torchrun(script, *flags, **options):
    """The script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    return subprocess.Popen([*command, ROOT / script, *map(str, flags)], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, **options)  # fmt: skip


def children(process):
    """Ids of the processes that torchrun began."""
    place = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not place.exists():
        pytest.skip("this system does not list the children of a process")
    return [int(number) for number in place.read_text().split()]


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def spoken(error):
    """What the script itself said on stderr, without torchrun's own summary."""
    return [line for line in error.splitlines() if line.startswith(("train.py:", "evaluate.py:"))]


def test_torchrun_trains_and_scores(flags, tmp_path):
    """The real network: the losses of two parts in one process, each file and each line once."""
    flags = ["--loss", "softmax+triplet", "--epochs", 2, *flags]
    process = torchrun("train.py", *flags, cwd=tmp_path)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    train.main([str(flag) for flag in (*flags, "--micro-batches", 2, "--run-dir", tmp_path / "one")])
    run, one = tmp_path / "run", tmp_path / "one"
    assert [line["loss"] for line in read_log(run)] == pytest.approx([line["loss"] for line in read_log(one)], rel=1e-3)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in one.iterdir())
    assert len(re.findall("^epoch 1/2: loss", out, flags=re.M)) == out.count("54 training images") == 1
    args, result = (json.loads((run / name).read_text()) for name in ("args.json", "result.json"))
    assert args["environment"]["processes"] == 2 and result["num_queries"] == 18 and len(result["log"]) == 2


def test_what_all_processes_meet_is_said_once(tmp_path):
    codes, said = two_scripts(tmp_path, "evaluate.py", "--run", tmp_path / "nowhere")
    assert codes == [1, 1] and len(said) == 1
    assert said[0].startswith(f"evaluate.py: {tmp_path / 'nowhere'} is not a run folder: it has no args.json")


def test_sigterm_to_torchrun_ends_all_after_the_step(flags, tmp_path):
    process = torchrun("train.py", "--loss", "softmax", "--epochs", 1000, *flags)
    wait_for(tmp_path / "run" / "log.jsonl", process)
    numbers = children(process)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode != 0 and not any(Path(f"/proc/{number}").exists() for number in numbers)
    finished = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"]
    assert f"stopped by SIGTERM: --resume --run-dir {tmp_path / 'run'} goes on from epoch {finished + 1}" in out
    assert out.count("stopped by") == 1 and not spoken(error) and "train.py\", line" not in error


def test_a_killed_process_ends_the_other_one(flags, tmp_path):
    process = torchrun("train.py", "--loss", "softmax", "--epochs", 1000, *flags)
    wait_for(tmp_path / "run" / "log.jsonl", process)
    numbers = children(process)
    os.kill(numbers[-1], signal.SIGKILL)
    out, error = process.communicate(timeout=60)  # the README says 30 s; torchrun itself has to notice and to end
    assert process.returncode != 0 and not any(Path(f"/proc/{number}").exists() for number in numbers)
    assert len(spoken(error)) <= 1 and "train.py\", line" not in error
    assert (tmp_path / "run" / "last.pt").exists() and not (tmp_path / "run" / "result.json").exists()


def test_a_bad_image_is_one_sentence(flags, folder, tmp_path):
    """Without a store it is met by the process whose share of a batch it is in."""
    bad = sorted((folder / "fewer").glob("bounding_box_train/*"))[-1]
    kept = bad.read_bytes()
    bad.write_bytes(kept[:100])
    flags = [*flags, "--data-dir", folder / "fewer", "--cache", "off"]
    codes, said = two_scripts(tmp_path, "train.py", "--loss", "softmax", *flags)
    bad.write_bytes(kept)
    said = [line for line in said if not line.startswith("warning: ")]
    assert codes == [1, 1] and len(said) == 1 and said[0].startswith("train.py: ") and bad.name in said[0]


def test_a_port_in_use_is_one_sentence(monkeypatch):
    """As seen by a process that somebody else than torchrun --standalone begins."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for key, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(key, str(value))
        sentence = r"^the processes can't meet \(.*\): torchrun --standalone finds a free port$"
        with pytest.raises(ValueError, match=sentence), distributed.processes():
            pass


@pytest.mark.parametrize("lacking", ["is_available", "is_gloo_available"])
def test_no_usable_backend_is_one_sentence(monkeypatch, lacking):
    monkeypatch.setattr(distributed.dist, lacking, lambda: False)
    with pytest.raises(ValueError, match="lacks torch.distributed with gloo: leave torchrun out"):
        distributed.join()


# ------------------------------------------------------------------------------------------------ what tables say of it


def test_tables_tell_other_batch_norm_statistics_apart():
    """Of runs with other parts, also of those before the published recipe had any, or in several processes."""
    args = new_run({"loss": "softmax", "dataset": "market", "recipe": "published"})
    words = str(describe(args))
    assert args["micro_batches"] == 4 and "micro-batches" not in words and "processes" not in words
    assert str(describe({**args, "micro_batches": DEFAULTS["micro_batches"]})).endswith("--micro-batches 1")
    assert "2 processes" in str(describe({**args, "environment": {"processes": 2}}))


def test_trainings_at_a_time_keep_to_the_gpus_they_were_given(monkeypatch):
    runs = [new_run({"loss": "softmax", "dataset": "market", "seed": seed}) for seed in range(3)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given, bound in (("", "010"), ("5,7", "575")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        starts = [line.split()[0] for line in commands(runs, 2, "python")]
        assert starts == [f"CUDA_VISIBLE_DEVICES={number}" for number in bound]
