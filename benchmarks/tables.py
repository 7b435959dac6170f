"""Writes the tables of benchmarks/README.md and losses/README.md from results/benchmarks/: python benchmarks/tables.py.

Each stands between `<!-- NAME -->` and `<!-- end -->`, NAME being a function below. A further machine's files change
nothing: the files that are shown are named here.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.files import write_text  # noqa: E402

READMES = [ROOT / "benchmarks" / "README.md", ROOT / "losses" / "README.md"]
RESULTS = ROOT / "results" / "benchmarks"
H100, XEON, EPYC = "nvidia-h100-80gb-hbm3", "intel-xeon-processor-2-threads", "amd-epyc-2-threads"
SIZES = {"market": "Market, 3,368 x 15,913", "msmt17": "MSMT17, 11,659 x 82,161",
         "market500k": "Market+500k, 3,368 x 515,913"}  # fmt: skip
ARCHS = {"resnet18": "ResNet-18, 128x64", "resnet50": "ResNet-50, 256x128"}


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(heads: list[str], lines: list[list]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def spread(middle: float, low: float, high: float, form: str = ".2f") -> str:
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def ranking_forms() -> str:
    rows = {(row["size"], row["form"]): row for row in load(f"ranking-forms_{EPYC}")["rows"]}
    lines = []
    for size, name in SIZES.items():
        product, old, new = (rows[size, form] for form in ("product alone", "581 lines", "199 lines"))
        times = [spread(*(form["times_product"][key] for key in ("median", "min", "max"))) for form in (new, old)]
        seconds = [f"{r['seconds']['median']:.2f} s" for r in (product, new, old)]
        difference = abs(new["metrics"]["mAP"] - old["metrics"]["mAP"])
        lines.append([name, *seconds, *times, f"{difference:.0e}", new["seconds"]["n"]])
    heads = ["query x gallery", "product", "this evaluator", "earlier form", "this, x product (min to max)",
             "earlier, x product", "difference of mAP", "turns"]  # fmt: skip
    return table(heads, lines)


def evaluator_peers() -> str:
    ways = load(f"evaluator_{XEON}")["cpu"][0]["ways"]
    lines = [[way, f"{row['seconds']['median']:.1f} s", f"{row['times_product']:.1f}", f"{row['extra_mib']:,.0f} MiB"]
             for way, row in ways.items() if way not in ("product alone", "this evaluator") and "seconds" in row]
    return table(["at Market's size", "time", "x product", "memory"], lines)


def evaluator_h100() -> str:
    lines = []
    for file, form in ((H100, "present"), (f"{H100}-counting-in-turn", "earlier")):
        rows = {(row["size"], row["way"]): row for row in load(f"gpu-evaluator_{file}")["rows"]}
        for size, name in SIZES.items():
            if (size, "rank_metrics") not in rows:
                lines.append([name, form, "not measured", *[""] * 5])
                continue
            mine, product, tf32, sort = (rows[size, way] for way in (
                "rank_metrics", "product alone", "product alone, TF32", "a sort on the device"))  # fmt: skip
            peer = rows.get((size, "torchreid's way"))
            times = spread(mine["milliseconds"], mine["min"], mine["max"], ".1f")
            lines.append([name, form, times, *(f"{r['milliseconds']:.1f}" for r in (product, tf32, sort)),
                          f"{peer['milliseconds']:,.0f}" if peer else "", f"{mine['extra_mib']:.0f}"])  # fmt: skip
    heads = ["query x gallery", "counting", "rank_metrics, ms (min to max)", "product", "product in TF32",
             "a sort on the GPU", "torchreid's way", "MiB"]  # fmt: skip
    return table(heads, lines)


def reranking_h100() -> str:
    lines = [[SIZES[r["size"]], f"{r['milliseconds']:,.0f} ms", r["n"], f"{r['extra_mib']:,.0f} MiB"]
             for r in load(f"gpu-reranking_{H100}")["rows"]]  # fmt: skip
    return table(["query x gallery", "re-ranked and scored", "turns", "memory"], lines)


def reranking_cpu() -> str:
    lines = []
    for result in load(f"reranking_{EPYC}")["results"] + load(f"reranking_{EPYC}-msmt17")["results"]:
        size = f"{result['query']:,} x {result['gallery']:,}"
        for way, row in [pair for pair in result["ways"].items() if "seconds" in pair[1]]:
            seconds = spread(*(row["seconds"][key] for key in ("median", "min", "max")), ".1f")
            numbers = [f"{row[key]:.2f}" for key in ("times_ours", "extra_gib")]
            lines.append([size, way, seconds, *numbers, row.get("queries_that_differ", "")])
    return table(["query x gallery", "way", "seconds (min to max)", "x ours", "GiB", "queries that differ"], lines)


def distributed_cpu() -> str:
    lines = []
    for row in load(f"distributed_{EPYC}")["processes"]:
        step = spread(row["ms"]["step"], *row["step_spread_ms"], ".0f")
        ms = row["ms"]
        parts = [f"{ms[key]:.1f}" if key in ms else "" for key in ("gather", "all-reduce", "stop signals")]
        lines.append([row["processes"], row["images"], step, *parts])
    heads = ["processes", "images", "a step, ms (min to max)", "gather, ms", "all-reduce, ms", "stop signals, ms"]
    return table(heads, lines)


def micro_batches_cpu() -> str:
    lines = [[row["images"], row["parts"], spread(row["ms"]["step"], *row["step_spread_ms"], ".0f"),
              f"{1000 * row['images'] / row['ms']['step']:.0f}", f"{row['peak_memory_mib']:,.0f}"]
             for row in load(f"distributed_{EPYC}")["micro_batches"]]  # fmt: skip
    return table(["images", "parts", "a step, ms (min to max)", "images/s", "peak memory, MiB"], lines)


def tricks_cpu() -> str:
    result = load(f"tricks_{EPYC}")
    names = [f"a step, {row['name']}" for row in result["rows"]]
    names += [f"embedding {result['batch_size']} images{', --flip-test' * (row['name'] == 'flip')}"
              for row in result["scoring"]]  # fmt: skip
    lines = [[name, spread(row["milliseconds"], row["min"], row["max"], ".0f"), f"{row['ratio']:.2f}"]
             for name, row in zip(names, [*result["rows"], *result["scoring"]], strict=True)]  # fmt: skip
    return table(["", "ms (min to max)", "ratio"], lines)


def plain(rows: list[dict]) -> list[dict]:
    """Rows of training that have a bare loop beside them, not compiled."""
    return [row for row in rows if "stages_ms" in row and not row["compile"]]


def training_cpu() -> str:
    lines = []
    for file in (XEON, f"{XEON}-resnet18"):
        for r in plain(load(f"training_{file}")["rows"]):
            speed = [r["images_per_second"][way]["median"] for way in ("train.py", "bare loop", "bare loop, NCHW")]
            lines.append([
                ARCHS[r["arch"]], r["precision"], r["repeats"],
                *(f"{value:.0f}" if r["arch"] == "resnet18" else f"{value:.1f}" for value in speed),
                spread(r["share_of_bare_loop"], *r["share_of_bare_loop_spread"]), f"{r['times_torchreid']:.2f}",
            ])  # fmt: skip
    heads = ["network", "precision", "turns", "images/s", "the limit", "the limit, NCHW", "share (min to max)",
             "x torchreid's way"]  # fmt: skip
    return table(heads, lines)


def training_h100() -> str:
    lines = []
    for r in plain(load(f"gpu-training_{H100}")["rows"]):
        stages = [f"{r['stages_ms'][key]:.1f}" for key in ("data", "forward", "loss", "backward", "optimizer")]
        lines.append([ARCHS[r["arch"]], r["precision"], f"{r['images_per_second']:,.0f}",
                      f"{r['bare_images_per_second']:,.0f}", f"{r['share_of_bare_loop']:.2f}", " / ".join(stages),
                      f"{r['peak_mib']:,} MiB", f"{r['checkpoint_seconds']:.2f} s"])  # fmt: skip
    heads = ["network", "precision", "images/s", "the limit", "share",
             "data / forward / loss / backward / optimizer, ms", "peak memory", "a checkpoint"]  # fmt: skip
    return table(heads, lines)


def losses_h100() -> str:
    result = load(f"gpu-losses_{H100}")
    many = {r["loss"]: r["milliseconds"]["median"] for r in result["rows"] if r["num_classes"] == 10_000}
    lines = [[f"`{r['loss']}`", f"{r['milliseconds']['median']:.2f}", f"{100 * r['share_of_step']:.1f} %",
              f"{r['milliseconds_with_launches']:.1f}", f"{many[r['loss']]:.2f}" if r["loss"] in many else ""]
             for r in result["rows"] if r["num_classes"] == 751]  # fmt: skip
    share = f"of a step ({result['step_milliseconds']:.1f} ms)"
    heads = ["loss", "ms", share, "ms with launches", "10,000 classes, ms"]
    return table(heads, lines)


def losses_cpu() -> str:
    result = load(f"losses_{EPYC}")
    rows = [r for r in result["rows"] if r["batch_size"] == 64 and r["num_classes"] in (None, 751)]
    times, step = [r["milliseconds"]["median"] for r in rows], result["network"]["milliseconds"]["cpu"]["bfloat16"]
    return (f"Two threads of an AMD EPYC, batches of 64, 751 classes: {min(times):.1f} to {max(times):.1f} ms, "
            f"at most {100 * max(times) / step['median']:.2f} % of a step of ResNet-50.")  # fmt: skip


def losses_beside_peers() -> str:
    """Batches of 64 and 160, 751 classes."""
    lines = []
    for row in load(f"losses_{EPYC}")["rows"]:
        if row["num_classes"] in (None, 751) and row["batch_size"] in (64, 160):
            ours, peer = row["milliseconds"]["median"], row.get("peer_milliseconds")
            lines.append([f"`{row['loss']}`", row["batch_size"], f"{ours:.2g}", f"{peer['median']:.2g}" if peer else "",
                          f"{row['peak_mib']:.1f}", f"{row['peer_peak_mib']:.1f}" if peer else ""])  # fmt: skip
    heads = ["loss", "batch", "ms", "pytorch-metric-learning, ms", "MiB", "pytorch-metric-learning, MiB"]
    return table(heads, lines)


def comparison_h100() -> str:
    result = load(f"gpu-comparison_{H100}")
    seconds = [run["seconds"] for by_seed in result["runs"].values() for run in by_seed.values()]
    left = sum(not by_seed for by_seed in result["runs"].values())
    return (f"{len(seconds)} trainings, {result['jobs']} at a time, of {result['epochs']} epochs each: "
            f"{min(seconds):.0f} to {max(seconds):.0f} s of training. The other {left} rows: not run.")  # fmt: skip


def kills() -> str:
    report = load("kill")
    return (f"{report['kills']} kills of one run of {report['epochs']} epochs; {report['half_files_left']} of them "
            f"left half a file behind. Differences in {report['tensors_compared']} tensors and "
            f"{report['log_lines_compared']} lines of the log: {len(report['differences'])}.")  # fmt: skip


TABLES = (ranking_forms, evaluator_peers, evaluator_h100, reranking_cpu, reranking_h100, training_cpu, training_h100,
          distributed_cpu, micro_batches_cpu, tricks_cpu, losses_h100, losses_cpu, losses_beside_peers, comparison_h100,
          kills)  # fmt: skip


def filled(text: str) -> str:
    """A README's text with every table made anew. KeyError for a name that is not in TABLES."""
    of_name = {function.__name__: function for function in TABLES}

    def fill(found: re.Match) -> str:
        return f"<!-- {found[1]} -->\n{of_name[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (?!end)(\w+) -->\n.*?\n<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    for readme in READMES:
        write_text(readme, filled(readme.read_text(encoding="utf-8")))
