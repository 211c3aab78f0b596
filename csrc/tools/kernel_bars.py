"""The bars that every kernel must reach: no spills, instruction counts as its tiles imply."""

from __future__ import annotations

from typing import Any

import kernel_head_model

Row = dict[str, Any]
Constants = dict[str, Any]
ROW_KERNELS = {  # the wide part of what passes over rows do
    "attention_backward_prepare": {"LDG": 2},
    "attention_backward_round": {"STG": 1},
}


HEAD_PASSES = {"head_softmax": 3, "head_distillation": 5}  # sums; gradients, kept or read again


def copies(values: int, own: Constants) -> int:
    """16-byte copies a thread for so many values of 16 bits."""
    return values * 2 // 16 // int(own["threads"])


def product(steps: int, tiles: int, columns: int) -> tuple[int, int]:
    """LDSM and HMMA of a product of two shared tiles: `tiles` x `columns` accumulators a warp.

    A fragment of the first operand serves 16 rows, one of the second 16 columns: each is loaded
    once a step.
    """
    return steps * (tiles + columns // 2), steps * tiles * columns


def forward_ideal(own: Constants) -> dict[str, int]:
    """Instructions a thread of attention forward issues for one tile of keys, and for Q."""
    tiles, keys, rows = own["warp_tiles"], own["keys"], own["rows"]
    steps = own["dim"] // 16
    # Fragments are loaded once a step: those of Q and K, those of V; each used on all rows.
    return {
        "LDSM": steps * (tiles + keys // 16) + keys // 16 * own["value_dim"] // 16,
        "HMMA": steps * tiles * keys // 8 + keys // 16 * tiles * own["value_dim"] // 8,
        # K before the loop and in it.
        "LDGSTS": copies(rows * own["dim"] + keys * (2 * own["dim"] + own["value_dim"]), own),
        "STG128": copies(rows * own["value_dim"], own),
        "STG32": 2 * tiles,  # LSE
    }


def backward_ideal(own: Constants) -> dict[str, int]:
    """The same of attention backward: one tile of rows, K and V, dK and dV."""
    rows, keys, both = own["rows"], own["keys"], own["dim"] + own["value_dim"]
    scores = own["score_tiles"], own["score_columns"]
    products = [
        product(own["dim"] // 16, *scores),  # q k
        product(own["value_dim"] // 16, *scores),  # dout v
        product(rows // 16, own["key_tiles"], own["value_columns"]),  # dV
        product(keys // 16, own["query_tiles"], own["query_columns"]),  # dQ
        product(rows // 16, own["key_tiles"], own["key_columns"]),  # dK
    ]
    return {
        "LDSM": sum(ldsm for ldsm, _ in products),
        "HMMA": sum(hmma for _, hmma in products),
        # Q and dO before the loop and in it, with 8 bytes of statistics a row.
        "LDGSTS": copies((keys + 2 * rows) * both, own),
        "LDGSTS64": 2,
        "STG128": copies(keys * both, own),
        # Accumulated: 4 sums an accumulator, in pairs where rows are even, else one by one.
        "STG64": 2 * own["key_tiles"] * (own["key_columns"] + own["value_columns"]),
        "STG32": 4 * own["key_tiles"] * (own["key_columns"] + own["value_columns"]),
        "STS": 2 * 2 * own["score_tiles"] * own["score_columns"],  # weights, scores' gradients
        "RED": 4 * own["query_tiles"] * own["query_columns"],  # sums
    }


def query_ideal(own: Constants) -> dict[str, int]:
    """The same of the kernel that owns query tiles: a warp's 16 rows, one tile of keys."""
    keys, dim, value_dim = own["keys"], own["dim"], own["value_dim"]
    scores, gradients = product(dim // 16, 1, keys // 8), product(value_dim // 16, 1, keys // 8)
    return {
        "LDSM": scores[0] + gradients[0] + keys // 16 * dim // 16,  # dQ's first operand is at hand
        "HMMA": scores[1] + gradients[1] + keys // 16 * dim // 8,
        "LDGSTS": copies((own["rows"] + keys) * (dim + value_dim), own),
        "STG128": copies(own["rows"] * dim, own),
    }


class Bars:
    def __init__(self, row: Row) -> None:
        self.missed: list[str] = []
        self.sass: dict[str, Any] = row["sass"]
        self.loop: dict[str, int] = row["sass"].get("loop", {})

    def equal(self, name: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            self.missed.append(f"{name}: {found}, not {wanted}")

    def at_most(self, name: str, found: int, most: int) -> None:
        if found > most:
            self.missed.append(f"{name}: {found}, over {most}")

    def at_least(self, name: str, found: int, least: int) -> None:
        if found < least:
            self.missed.append(f"{name}: {found}, under {least}")

    def products(self, ideal: dict[str, int]) -> None:
        """One loop, neither unrolled nor split, holds every product."""
        for name in ("LDSM", "HMMA"):
            self.equal(name, self.sass[name], ideal[name])
            self.equal(f"{name} in the loop", self.loop.get(name), ideal[name])

    def scalars(self, own: Constants, tiles: int) -> None:
        """What a kernel reads in its loop: a slope a row; seed and offset."""
        self.equal("LDG wider than a scalar", self.sass["LDG"].get("128", 0), 0)
        most = 2 * tiles + 3 if own["modified"] else 0
        self.at_most("LDG in the loop", self.loop.get("LDG", 0), most)

    def forward(self, own: Constants) -> None:
        ideal = forward_ideal(own)
        self.products(ideal)
        self.equal("LDGSTS by width", self.sass["LDGSTS"], {"128": ideal["LDGSTS"]})
        wanted = {"128": ideal["STG128"], "32": ideal["STG32"]}
        self.equal("STG by width", self.sass["STG"], wanted)
        self.scalars(own, own["warp_tiles"])

    def backward(self, own: Constants) -> None:
        ideal = backward_ideal(own)
        self.products(ideal)
        wanted = {"128": ideal["LDGSTS"], "64": ideal["LDGSTS64"]}
        self.equal("LDGSTS by width", self.sass["LDGSTS"], wanted)
        wanted = {width: ideal[f"STG{width}"] for width in ("128", "32", "64")}
        self.equal("STG by width", self.sass["STG"], wanted)
        self.at_least("LDG of pairs", self.sass["LDG"].get("64", 0), ideal["STG64"])
        self.equal("STS in the loop", self.loop.get("STS"), ideal["STS"])
        added = sum(int(bits) // 32 * n for bits, n in self.sass["RED"].items())
        self.equal("words added to dQ", added, ideal["RED"])
        self.scalars(own, own["score_tiles"])

    def query(self, own: Constants) -> None:
        ideal = query_ideal(own)
        self.products(ideal)
        self.equal("LDGSTS by width", self.sass["LDGSTS"], {"128": ideal["LDGSTS"]})
        self.equal("STG by width", self.sass["STG"], {"128": ideal["STG128"]})
        self.equal("RED by width", self.sass["RED"], {})
        self.scalars(own, 1)

    def head(self, own: Constants) -> None:
        """Rows come through cp.async and leave in whole words; only options read anything else."""
        passes = self.sass["passes"]
        self.equal("loops over words", len(passes), HEAD_PASSES[own["kernel"]])
        copying = [bool(one["LDGSTS"]) for one in passes]
        kept = (len(passes) - 1) // 2
        self.equal("loops that copy", copying.count(True), 1 + kept)
        stored = {str(8 * own["gradient_bytes"])}
        scalars = 0 if "plain" in own["instance"] else 3 - own["abreast"]  # bias, class weights
        for number, one in enumerate(passes):
            of = f"of loop {number + 1}"
            self.equal(f"LDGSTS {of}, other than 16 bytes", one["LDGSTS"].keys() - {"128"}, set())
            self.equal(f"STG {of}, other than a word", one["STG"].keys() - stored, set())
            self.equal(f"LDG {of} wider than a scalar", one["LDG"].keys() - {"32"}, set())
            self.at_most(
                f"LDG {of}", sum(one["LDG"].values()), scalars * one["words"] * own["values"]
            )
            self.equal(f"untyped {of}", one["untyped"], 0)
            moved = one["LDGSTS"].get("128", 0), one["STG"].get(min(stored), 0)
            words = one["words"] if one["LDGSTS"] else 0, one["words"] // own["abreast"]
            self.equal(f"words copied {of}", moved[0], words[0])
            self.equal(f"words stored {of}", moved[1], words[1] if number else 0)

    def head_speed(self, row: Row, own: Constants) -> None:
        """Plain kernels leave the memory the busiest unit, everywhere that rows are held."""
        for gpu in (kernel_head_model.H100, kernel_head_model.A100):
            if row["arch"] != gpu.arch or "plain" not in own["instance"]:
                continue
            for classes in map(int, row["residency"]):
                e = kernel_head_model.estimate(gpu, row, own, classes)
                if e.slots > e.slots_allowed or e.mufu > e.mufu_allowed:
                    self.missed.append(f"{classes} classes: slower than memory on {gpu.name}")

    def narrow(self, kernel: str) -> None:
        """Copies of rows, and passes over rows."""
        if "16-byte" in kernel:
            wide = {"64", "128"}
            self.equal(
                "LDG narrower than 16 bytes, but for the index", self.sass["LDG"].keys(), wide
            )
            self.equal("STG by width", set(self.sass["STG"]), {"128"})
        for name, wanted in ROW_KERNELS.get(kernel.split()[0], {}).items():
            self.equal(f"{name} of 16 bytes", self.sass[name].get("128", 0), wanted)


def violations(row: Row, own: Constants) -> list[str]:
    """The bars that a row misses, whatever the compiler."""
    missed = [f"{n} is {row[n]}" for n in ("stack", "spill_stores", "spill_loads") if row[n] != 0]
    missed += [f"doesn't run on {d}" for d, blocks in row["blocks_per_sm"].items() if blocks < 1]
    for classes, places in row.get("residency", {}).items():
        nowhere = [d for d, place in places.items() if place["blocks_per_sm"] < 1]
        missed += [f"doesn't run on {d} with {classes} classes" for d in nowhere]
    if "sass" not in row:
        return missed
    bars = Bars(row)
    bars.equal("loads and stores of local memory", bars.sass["local"], 0)
    if not (own["kernel"] in HEAD_PASSES and row["arch"] == "sm_90"):  # they read other blocks'
        bars.equal("loads and stores of unknown memory", bars.sass["untyped"], 0)
    by_kernel = {
        "attention_forward": bars.forward,
        "attention_backward": bars.backward,
        "attention_backward_query": bars.query,
    }
    if own["kernel"] in HEAD_PASSES:
        bars.head(own)
        if not bars.missed:
            bars.head_speed(row, own)
    elif own["kernel"] in by_kernel:
        by_kernel[own["kernel"]](own)
    else:
        bars.narrow(row["kernel"])
    return missed + bars.missed
