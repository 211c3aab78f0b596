"""The machine code of every kernel: instruction counts at the ideal, wide global loads, no local
memory. What was counted stands in csrc/tools/budgets.json too, for machines without nvdisasm."""

from __future__ import annotations

import copy

import kernels
import pytest
from kernels import COMMITTED, GROUPS, KEYS, kernel_table

import kernel_bars  # isort: skip  (csrc/tools, put on the path by kernels)
import kernel_build  # isort: skip
import kernel_sass  # isort: skip

PLAIN = COMMITTED["attention_forward bf16 128/128 plain", "sm_80"]
MODIFIED = COMMITTED["attention_forward bf16 128/128 modified", "sm_80"]
BACKWARD = COMMITTED["attention_backward bf16 128/128 plain", "sm_80"]
SOFTMAX = COMMITTED["head_softmax fp32/bf16 plain", "sm_90"]
OPTIONS = COMMITTED["head_softmax fp32/bf16 modified", "sm_90"]
QUERY = COMMITTED["attention_backward_query bf16 128/128 plain", "sm_80"]


@pytest.mark.parametrize("group", GROUPS)
def test_machine_code(group):
    if kernel_build.nvdisasm() is None:
        pytest.skip("needs nvdisasm: a CUDA toolkit, triton, or VARSTREAM_NVDISASM=path")
    for key in GROUPS[group]:
        row = kernels.rows()[key]
        assert kernel_bars.violations(row, kernels.traits_of(row)) == [], key
        if kernels.same_compiler():
            assert kernel_table.differences(COMMITTED[key], row, same_compiler=True) == [], key


def test_the_table_holds_every_kernel_s_counts():
    assert [key for key in KEYS if "sass" not in COMMITTED[key]] == []
    looped = [key for key in KEYS if "loop" in COMMITTED[key]["sass"]]
    assert looped == [key for key in KEYS if "tile" in COMMITTED[key]]


def test_the_ideal_by_hand():
    """128 x 64 tile of head dim 128, four warps of 32 rows."""
    ideal = kernel_bars.forward_ideal(kernels.traits_of(PLAIN))
    assert ideal == {
        "LDSM": 8 * (2 + 4) + 4 * 8,  # 8 steps of 2 Q and 4 K fragments; 4 steps of 8 V fragments
        "HMMA": 8 * 2 * 8 + 4 * 2 * 16,
        "LDGSTS": (128 + 3 * 64) * 256 // 16 // 128,
        "STG128": 128 * 256 // 16 // 128,
        "STG32": 4,
    }


def test_the_backward_s_ideal_by_hand():
    """64 x 128 tile of head dim 128, eight warps: 32 x 32 scores, 32 x 64 of dK, 32 x 32 of dQ."""
    ideal = kernel_bars.backward_ideal(kernels.traits_of(BACKWARD))
    assert ideal == {
        "LDSM": 8 * (2 + 2) + 8 * (2 + 2) + 4 * (2 + 4) + 8 * (2 + 2) + 4 * (2 + 4),
        "HMMA": 5 * 2 * 64 * 128 * 128 // (8 * 2 * 16 * 8 * 16),
        "LDGSTS": (128 + 2 * 64) * 2 * 256 // 16 // 256,
        "LDGSTS64": 2,
        "STG128": 128 * 2 * 256 // 16 // 256,
        "STG64": 2 * 32 * 64 // 2 // 32,
        "STG32": 2 * 32 * 64 // 32,
        "STS": 2 * 32 * 32 // 2 // 32,
        "RED": 32 * 32 // 32,
    }


def test_the_ideal_of_owned_queries_by_hand():
    """64 x 64 tile of head dim 128, four warps of 16 rows."""
    ideal = kernel_bars.query_ideal(kernels.traits_of(QUERY))
    assert ideal == {
        "LDSM": 2 * 8 * (1 + 4) + 4 * 8,
        "HMMA": 3 * 64 * 64 * 128 // (4 * 16 * 8 * 16),
        "LDGSTS": 4 * 64 * 256 // 16 // 128,
        "STG128": 64 * 256 // 16 // 128,
    }


def with_value(row: kernels.Row, path: tuple[str, ...], value: object) -> kernels.Row:
    changed = copy.deepcopy(row)
    place = changed["sass"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("LDSM",), 96, "LDSM: 96, not 80"),
        (("HMMA",), 512, "HMMA: 512, not 256"),
        (("loop", "HMMA"), 128, "HMMA in the loop: 128, not 256"),
        (("LDGSTS",), {"32": 160}, "LDGSTS by width: {'32': 160}, not {'128': 40}"),
        (
            ("STG",),
            {"32": 4, "64": 32},
            "STG by width: {'32': 4, '64': 32}, not {'128': 16, '32': 4}",
        ),
        (("LDG",), {"128": 1}, "LDG wider than a scalar: 1, not 0"),
        (("loop", "LDG"), 1, "LDG in the loop: 1, over 0"),
        (("local",), 2, "loads and stores of local memory: 2, not 0"),
        (("untyped",), 2, "loads and stores of unknown memory: 2, not 0"),
    ],
)
def test_counts_off_the_ideal_miss_the_bar(path, value, complaint):
    row = with_value(PLAIN, path, value)
    assert kernel_bars.violations(row, kernels.traits_of(row)) == [complaint]


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("loop", "LDSM"), 80, "LDSM in the loop: 80, not 144"),
        (("HMMA",), 640, "HMMA: 640, not 320"),
        (("LDGSTS",), {"128": 34}, "LDGSTS by width: {'128': 34}, not {'128': 32, '64': 2}"),
        (("STG",), {"32": 192}, "STG by width: {'32': 192}, not {'128': 16, '32': 128, '64': 64}"),
        (("LDG",), {"32": 200}, "LDG of pairs: 0, under 64"),
        (("loop", "STS"), 64, "STS in the loop: 64, not 32"),
        (("RED",), {"32": 65}, "words added to dQ: 65, not 32"),
        (("RED",), {"128": 17}, "words added to dQ: 68, not 32"),
        (("loop", "LDG"), 1, "LDG in the loop: 1, over 0"),
    ],
)
def test_the_backward_s_counts_off_the_ideal_miss_the_bar(path, value, complaint):
    row = with_value(BACKWARD, path, value)
    assert kernel_bars.violations(row, kernels.traits_of(row)) == [complaint]


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("LDSM",), 80, "LDSM: 80, not 112"),
        (("STG",), {"128": 8, "32": 1}, "STG by width: {'128': 8, '32': 1}, not {'128': 8}"),
        (("RED",), {"32": 4}, "RED by width: {'32': 4}, not {}"),
    ],
)
def test_owned_queries_counts_off_the_ideal_miss_the_bar(path, value, complaint):
    row = with_value(QUERY, path, value)
    assert kernel_bars.violations(row, kernels.traits_of(row)) == [complaint]


@pytest.mark.parametrize(
    ("kernel", "name", "wide"),
    [("attention_backward_prepare", "LDG", 2), ("attention_backward_round", "STG", 1)],
)
def test_narrow_passes_over_rows_miss_the_bar(kernel, name, wide):
    row = with_value(COMMITTED[f"{kernel} bf16", "sm_80"], (name,), {"64": 4})
    complaint = f"{name} of 16 bytes: 0, not {wide}"
    assert kernel_bars.violations(row, kernels.traits_of(row)) == [complaint]


@pytest.mark.parametrize(
    ("number", "name", "value", "complaint"),
    [
        (0, "LDGSTS", {"32": 8}, "LDGSTS of loop 1, other than 16 bytes: {'32'}, not set()"),
        (0, "LDGSTS", {"128": 1}, "words copied of loop 1: 1, not 2"),
        (1, "LDGSTS", {"128": 2}, "words copied of loop 2: 2, not 4"),
        (1, "LDGSTS", {"128": 4}, "loops that copy: 3, not 2"),
        (1, "STG", {"16": 16}, "STG of loop 2, other than a word: {'16'}, not set()"),
        (2, "STG", {"64": 1}, "words stored of loop 3: 1, not 2"),
        (0, "LDG", {"32": 2}, "LDG of loop 1: 2, over 0"),
        (2, "untyped", 1, "untyped of loop 3: 1, not 0"),
    ],
)
def test_the_head_s_rows_off_whole_words_miss_the_bar(number, name, value, complaint):
    row = copy.deepcopy(SOFTMAX)
    row["sass"]["passes"][number][name] = value
    assert complaint in kernel_bars.violations(row, kernels.traits_of(row))
    assert kernel_bars.violations(SOFTMAX, kernels.traits_of(SOFTMAX)) == []


def test_a_changed_loop_of_the_head_is_one_difference():
    row = copy.deepcopy(SOFTMAX)
    row["sass"]["passes"][1]["mix"]["FADD"] += 1
    [line] = kernel_table.differences(SOFTMAX, row, same_compiler=True)
    assert line.startswith("sass.passes.2.mix.FADD is ")


def test_options_of_the_head_read_bias_and_class_weight():
    row = copy.deepcopy(OPTIONS)
    assert row["sass"]["passes"][0]["LDG"] == {"32": 2 * 2 * 4}
    row["sass"]["passes"][0]["LDG"] = {"32": 17}
    assert kernel_bars.violations(row, kernels.traits_of(row)) == ["LDG of loop 1: 17, over 16"]


def test_a_plain_head_slower_than_memory_misses_the_bar():
    row = copy.deepcopy(SOFTMAX)
    row["sass"]["passes"][0]["mix"]["all"] = 8 * 60
    assert kernel_bars.violations(row, kernels.traits_of(row)) == [
        f"{classes} classes: slower than memory on H100" for classes in row["residency"]
    ]


def test_other_blocks_memory_is_read_on_sm_90_only():
    old = with_value(COMMITTED["head_softmax bf16/bf16 plain", "sm_80"], ("untyped",), 1)
    [complaint] = kernel_bars.violations(old, kernels.traits_of(old))
    assert complaint == "loads and stores of unknown memory: 1, not 0"


def test_modified_kernels_read_scalars_in_the_loop():
    row = copy.deepcopy(MODIFIED)
    assert row["sass"]["loop"]["LDG"] > 0
    row["sass"]["loop"]["LDG"] = 8
    assert kernel_bars.violations(row, kernels.traits_of(row)) == ["LDG in the loop: 8, over 7"]


def test_narrow_copies_of_16_byte_rows_miss_the_bar():
    row = copy.deepcopy(COMMITTED["gather_rows 16-byte", "sm_90"])
    row["sass"]["STG"] = {"32": 8}
    [complaint] = kernel_bars.violations(row, kernels.traits_of(row))
    assert complaint == "STG by width: {'32'}, not {'128'}"


# --- the reader of listings -----------------------------------------------------------------------

LISTING = """
\t.section\t.text.first,"ax",@progbits
.text.first:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R2, [R4.64] ;
        /*0020*/              @!P0 LDG.E.U16 R2, [R4.64] ;
.L_x_0:
        /*0030*/                   LDSM.16.M88.4 R4, [R8] ;
        /*0040*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0070*/                   FSEL R8, R8, RZ, P0 ;
        /*0080*/                   FSEL R9, R9, RZ, P0 ;
        /*0090*/                   FSEL R9, R9, RZ, P0 ;
.L_x_2:
        /*00a0*/               @P2 BRA `(.L_x_3) ;
        /*00b0*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64], P0 ;
        /*00b1*/               @P3 BRA `(.L_x_5) ;
        /*00b2*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R8 ;
        /*00b3*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00b4*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR8][R2.64], R8 ;
.L_x_3:
        /*00b8*/                   STS [R4], R8 ;
        /*00c0*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*00d0*/                   BRA !P1, `(.L_x_0) ;
        /*00d8*/              @!PT LDS RZ, [RZ] ;
        /*00e0*/                   STL [R1], R2 ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);

\t.section\t.text.second,"ax",@progbits
.text.second:
        /*0000*/                   ST.E [R2], R4 ;
        /*0010*/                   STG.E.128 [R2.64], R4 ;
        /*0020*/                   EXIT ;
"""


def test_listings_are_read():
    first, second = (kernel_sass.counts_by_kernel(LISTING)[name] for name in ("first", "second"))
    assert first["instructions"] == 23 and second["instructions"] == 3
    assert (first["HMMA"], first["LDSM"], first["local"], first["untyped"]) == (2, 1, 1, 0)
    assert first["LDG"] == {"16": 1, "64": 1} and first["LDGSTS"] == {"128": 1}
    assert first["RED"] == {"128": 1, "32": 1}
    assert first["loop"] == {"LDSM": 1, "HMMA": 2, "LDG": 0, "STS": 1, "RED": 2}
    # Round the FSELs by the second branch, not round the copy and one of the additions: work.
    tile = first["tile"]
    counted = {name: tile[name] for name in ("all", "HMMA", "LDGSTS", "STS", "RED", "rest")}
    assert counted == {"all": 12, "HMMA": 2, "LDGSTS": 1, "STS": 1, "RED": 1, "rest": 6}
    assert second["STG"] == {"128": 1} and second["untyped"] == 1 and "loop" not in second


ROWS = """
.text.rows:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64], P0 ;
        /*0020*/                   LDS.128 R4, [R8] ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   MUFU.RCP R5, R5 ;
        /*0060*/                   FMUL R5, R5, R5 ;
.L_x_1:
        /*0070*/              @!P1 BRA `(.L_x_2) ;
        /*0080*/                   MUFU.EX2 R5, R5 ;
        /*0090*/                   FADD R5, R5, R5 ;
.L_x_2:
        /*00a0*/               @P2 BRA `(.L_x_0) ;
        /*00b0*/                   SHFL.BFLY P2, R20, R25, R22, R27 ;
.L_x_3:
        /*00c0*/                   LDS.128 R4, [R8] ;
        /*00d0*/                   STG.E.EF.64 desc[UR8][R4.64], R4 ;
        /*00e0*/               @P2 BRA `(.L_x_3) ;
.L_x_4:
        /*00f0*/                   LDS.128 R4, [R8] ;
        /*0100*/               @P2 BRA `(.L_x_4) ;
        /*0110*/               @P2 BRA `(.L_x_0) ;
        /*0120*/                   EXIT ;
"""


PASSES = """
.text.loop:
        /*0000*/               @P0 EXIT ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   IMAD R4, R4, R4, R4 ;
.L_x_1:
        /*0040*/                   STG.E.128 [R2.64], R4 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.text.straight:
        /*0000*/               @P0 EXIT ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   SHFL.BFLY PT, R4, R0, RZ, 0x1f ;
.L_x_2:
        /*0030*/                   LDG.E.64 R4, [R2.64] ;
        /*0040*/                   STG.E [R2.64], R4 ;
        /*0050*/                   EXIT ;
        /*0060*/                   NOP ;
"""


def test_passes_over_rows_are_read():
    """A round of the loop that copies, else all of the kernel; shuffles are no option."""
    found = kernel_sass.counts_by_kernel(PASSES)
    assert found["loop"]["round"] == {"all": 4, "LDG": {"128": 1}, "STG": {"128": 1}}
    assert found["straight"]["round"] == {"all": 6, "LDG": {"64": 1}, "STG": {"32": 1}}
    assert "round" not in kernel_sass.counts_by_kernel(LISTING)["second"]  # loads nothing


def test_loops_over_rows_are_read():
    """The softcap's branch is an option, the exponential none; outer loops and loops that move
    nothing are left out."""
    counted = kernel_sass.counts_by_kernel(ROWS)["rows"]
    sums, gradient = counted["passes"]
    assert (sums["words"], sums["all"], sums["LDGSTS"]) == (1, 10, {"128": 1})
    mix = {name: sums["mix"][name] for name in ("all", "MUFU", "FMUL", "FADD")}
    assert mix == {"all": 7, "MUFU": 1, "FMUL": 0, "FADD": 1}
    assert (gradient["all"], gradient["STG"], gradient["LDGSTS"]) == (3, {"64": 1}, {})
    assert "passes" not in kernel_sass.counts_by_kernel(LISTING)["first"]


def test_an_unrolled_loop_is_one_without_a_loop():
    text = LISTING.replace("BRA !P1, `(.L_x_0)", "NOP")
    assert "loop" not in kernel_sass.counts_by_kernel(text)["first"]
