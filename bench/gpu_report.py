"""The record of a GPU run as a page of Markdown: targets first, then a table of each section, then what failed and what was skipped.

Reads the record alone; shares are of the ceilings that the same run measured. Floors: bytes at the rate of the copy, or operations at that of the
best matrix product, whichever takes longer.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from bench.gpu_log import Log, Record


class Target(NamedTuple):
    """`reached`: the number and what it says of, or why there is none."""

    aim: str
    reached: str
    verdict: str


class Roof(NamedTuple):
    """What the device can do; NaN before it is measured."""

    gb_per_s: float
    tflop_per_s: float

    def floor_us(self, moved: float, flops: float) -> float:
        """The least time of so many bytes and operations."""
        return max(moved / self.gb_per_s / 1e3, flops / self.tflop_per_s / 1e6)


def roof(log: Log) -> Roof:
    """The ceilings of the run."""
    found = log.results("ceilings")
    products = [r["tflop_per_s"] for r in found.values() if "tflop_per_s" in r]
    return Roof(found.get("copy", {}).get("gb_per_s", math.nan), max(products, default=math.nan))


def mean(ratios: list[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def judge(aim: str, ratios: dict[str, float], bound: float, above: bool = True) -> Target:
    """Whether the worst of `ratios` by cell keeps to `bound`; without ceilings they are NaN and say nothing."""
    ratios = {key: r for key, r in ratios.items() if not math.isnan(r)}
    if not ratios:
        return Target(aim, "no cell was measured, or no ceiling", "open")
    worst = (min if above else max)(ratios, key=lambda key: ratios[key])
    kept = ratios[worst] >= bound if above else ratios[worst] <= bound
    far = sum((r < bound) if above else (r > bound) for r in ratios.values())
    said = f"{ratios[worst]:.2f} ({worst}) at worst, {mean(list(ratios.values())):.2f} on average over {len(ratios)} cells, {far} miss it"
    return Target(aim, said, "reached" if kept else "missed")


def targets(log: Log) -> list[Target]:
    """What docs/kernels.md aims at, beside what this run saw."""
    top, cells, steps = roof(log), log.results("attention"), log.results("step")
    streams, products, peers = {}, {}, {}
    for key, r in cells.items():
        s = r["shape"]
        packed, tokens = s["rows"] * s["group"], s["batch"] * s["length"]
        if "prefix_us" in r and tokens >= 32768:
            if packed <= 128:
                streams[key] = r["prefix_moved"] / r["prefix_us"] / 1e3 / top.gb_per_s
            if packed == 256:
                products[key] = r["prefix_flops"] / r["prefix_us"] / 1e6 / top.tflop_per_s
        theirs = [us for name, us in r["peers_us"].items() if name.startswith("flashinfer") and isinstance(us, float)]
        if theirs:
            peers[key] = min(theirs) / r["us"]
    over = {key: r["us"] / top.floor_us(r["moved"], r["flops"]) for key, r in steps.items() if "us" in r}
    small = {k: v for k, v in over.items() if k.startswith("llama-3.1-8b") and steps[k]["case"][1] * steps[k]["case"][2] <= 64}
    draft = {k: v for k, v in over.items() if k.startswith("qwen3-0.6b verify 1 x 8 ")}
    average = mean(list(peers.values())) if peers else math.nan
    return [
        judge("prefix launch >= 0.8 of copy bandwidth, B L >= 32 K, M <= 128", streams, 0.8),
        judge("prefix launch >= 0.6 of the matmul rate, B L >= 32 K, M = 256", products, 0.6),
        Target("geometric mean >= 1.0 x FlashInfer's best form", f"{average:.2f} over {len(peers)} cells" if peers else "no cell was measured",
               "open" if not peers else "reached" if average >= 1 else "missed"),
        judge("no cell below 0.8 x FlashInfer's best form", peers, 0.8),
        judge("8B step of <= 64 rows within 1.25 x of its floor", small, 1.25, above=False),
        judge("0.6B draft forward of 8 rows within 2 x of its floor", draft, 2.0, above=False),
    ]  # fmt: skip


def table(head: str, rows: Iterable[Iterable[Any]]) -> list[str]:
    """A Markdown table; `head` is its columns between bars."""
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    return [*lines, *("| " + " | ".join(shown(cell) for cell in row) + " |" for row in rows), ""]


def shown(cell: Any) -> str:
    """A cell of a table."""
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return str(cell).replace("|", "/").replace("\n", " ")


def attention_table(cells: dict[str, Record], top: Roof) -> list[str]:
    """A row for each cell: ours, its share of the floor, the prefix launch, the peers as times of ours."""
    names = sorted({name for r in cells.values() for name in r["peers_us"]})
    rows = []
    for key, r in cells.items():
        us, prefix = r["us"], r.get("prefix_us", math.nan)
        rows.append([
            key, us, r["moved"] / us / 1e3, r["flops"] / us / 1e6, top.floor_us(r["moved"], r["flops"]) / us, prefix,
            r["prefix_moved"] / prefix / 1e3 / top.gb_per_s, r["prefix_flops"] / prefix / 1e6 / top.tflop_per_s, us - prefix, r["distance"],
            *(p / us if isinstance(p := r["peers_us"].get(name), float) else "-" if p is None else "failed" for name in names),
        ])  # fmt: skip
    head = "cell | us | GB/s | TFLOP/s | of floor | prefix us | of copy | of matmul | rest us | distance" + "".join(f" | {n}" for n in names)
    return table(head, rows)


def step_table(cells: dict[str, Record], top: Roof) -> list[str]:
    """A row for each case: the floor of its pass, and as multiples of it the captured pass, or by the clock a whole step or transformers' pass."""
    rows = []
    for key, r in cells.items():
        floor = top.floor_us(r["moved"], r["flops"]) if "moved" in r else math.nan
        pass_us, run_us = r.get("us", math.nan), r.get("run_us", math.nan)
        rows.append([key, floor, pass_us, pass_us / floor, run_us, run_us / floor])
    return table("case | floor us | captured us | x floor | by the clock us | x floor", rows)


def profile_tables(cells: dict[str, Record]) -> list[str]:
    """The kernels of a pass that took longest."""
    lines = []
    for key, r in cells.items():
        lines += [f"{key}, {r['case']}: {r['kernels']} kernels in {r['span_us']:.0f} us, {r['gaps']:.0%} of the time none ran", ""]
        lines += table("kernel | calls | us | share", ([k["kernel"], k["calls"], k["us"], k["us"] / r["busy_us"]] for k in r["top"]))
    return lines


def page(log: Log) -> str:
    """All of it."""
    top, machine = roof(log), log.results("ceilings").get("machine", {})
    dry = log.results("run").get("command", {}).get("dry")
    lines = ["# A GPU run" + (": a dry run, every time is made up" if dry else ""), ""]
    lines += [", ".join(f"{k} {shown(v)}" for k, v in machine.items() if k not in ("section", "key")), ""]
    lines += [f"Ceilings: copy {top.gb_per_s:.0f} GB/s (read + written), bf16 product {top.tflop_per_s:.0f} TFLOP/s.", ""]
    lines += ["## Targets", "", *table("target | reached | verdict", targets(log))]
    products = [(k, r["us"], r["tflop_per_s"]) for k, r in log.results("ceilings").items() if "tflop_per_s" in r]
    lines += ["## Products", "", *table("rows x outputs x inputs | us | TFLOP/s", products)]
    lines += ["## Attention", "", "Peers: their time as a multiple of ours.", "", *attention_table(log.results("attention"), top)]
    lines += ["## FlexAttention", "", *attention_table(log.results("flex"), top), "## Steps", "", *step_table(log.results("step"), top)]
    lines += ["## Profile", "", *profile_tables(log.results("profile"))]
    ops = [(k, f := top.floor_us(r["moved"], r["flops"]), r["us"], f / r["us"]) for k, r in log.results("ops").items()]
    lines += ["## Ops", "", *table("op | floor us | us | share", ops), "## Checks", ""]
    checks = [(s, r["key"], "failed" if "error" in r else "well", r.get("said", "")) for s in ("build", "tests", "sanitizer")
              for r in log.read(s) if "key" in r]  # fmt: skip
    lines += [*table("section | what | result | last words", checks), "## Not measured", "", *table("section | cell | why", missing(log))]
    return "\n".join(lines)


def missing(log: Log) -> list[tuple[str, str, str]]:
    """Errors, peers that failed, cells that were skipped or lost, notes."""
    found = []
    for r in log.read():
        section = r["section"]
        if "error" in r:
            found.append((section, r.get("key", "all"), r["error"]))
        found += [(section, r["key"], f"{name}: {why}") for name, why in r.get("peers_us", {}).items() if isinstance(why, str)]
        found += [(section, key, "no time was left") for key in r.get("skipped", ())]
        if "note" in r:
            found.append((section, "note", r["note"]))
    for section in dict.fromkeys(r["section"] for r in log.read()):
        found += [(section, key, "its process ended without a word") for key in sorted(log.lost(section))]
    return found
