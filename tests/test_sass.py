"""The scan of Hopper code for the assembler's defects, on what ptxas 12.8, 12.9 and 13.0 made of kernels."""

from __future__ import annotations

import pytest

from tools.sass import defects, wrong_addresses

LOAD = "        /*0040*/                   ULDC.64 UR16, c[0x0][0x208] ;    /* 0x0000820000107ab9 */\n"
USE = "        /*3770*/                   LDG.E.128 R60, desc[UR16][R60.64] ;    /* 0x000000103c3c7981 */\n"
BASE = "        /*6750*/                   USGXT.U32 UR12, UR4, 0xe ;    /* 0x0000000e040c789a */\n"
WRONG = (
    "        /*6850*/                   UIADD3 UR4, UP0, UR16, 0x20, URZ ;    /* 0x000000201004 */\n"
    "        /*6860*/                   UIADD3.X UR5, UR16, -0x3ffffff0, URZ, UP0, !UPT ;    /* 0xc000 */\n"
)
HALVES = WRONG.replace("UR16", "UR7")
RIGHT = "        /*6850*/                   UIADD3 UR4, UP0, UR12, 0x20, URZ ;    /* 0x000000200c04 */\n"
COPY = "        /*0050*/                   UMOV UR8, UR16 ;    /* 0x0000001000087c82 */\n"
SEVEN = "        /*6840*/                   UMOV UR7, UR12 ;    /* 0x0000000c00077c82 */\n"
UNWRITTEN = "        /*0d20*/                   UIADD3.X UR37, UR37, -0x7fffffe0, URZ, UP0, !UPT ;    /* 0x80000 */\n"
REUSE = "        /*6740*/                   USHF.R.U32.HI UR16, URZ, 0x4, UR4 ;    /* 0x000000043f107899 */\n"


def test_arithmetic_on_the_global_descriptor_is_found():
    assert len(wrong_addresses(LOAD + USE + BASE + WRONG)) == 2


@pytest.mark.parametrize("predicate", ["@P0 ", "@!UP1 "])
def test_predicated_too(predicate):
    assert wrong_addresses(LOAD + WRONG.replace("UIADD3 ", predicate + "UIADD3 "))


def test_through_a_copy():
    assert wrong_addresses(LOAD + COPY + WRONG.replace("UR16", "UR8"))


def test_both_halves_from_one_register():
    assert len(wrong_addresses(LOAD + USE + BASE + SEVEN + HALVES)) == 1
    assert wrong_addresses(LOAD + BASE + SEVEN + HALVES.replace("UIADD3.X UR5, UR7", "UIADD3.X UR5, URZ")) == []


def test_both_halves_from_one_register_though_far_apart():
    """From chunk_forward of (64, 97) by ptxas 12.8, which reads outside of shared memory; 12.9 takes two registers."""
    lower = "        /*4a00*/                   UIADD3 UR14, UP0, UR6, 0x40, URZ ;    /* 0x000000400600e890 */\n"
    upper = "        /*4bd0*/                   UIADD3.X UR15, UR6, -0x7fffffe0, URZ, UP0, !UPT ;    /* 0x800 */\n"
    known = BASE.replace("UR12", "UR6")
    between = "        /*4a10*/                   LDS.U16 R9, [R8+0x10] ;    /* 0x0000100008097984 */\n" * 40
    assert wrong_addresses(known + lower + between + upper) == ["UIADD3.X UR15, UR6, -0x7fffffe0, URZ, UP0, !UPT "]
    assert wrong_addresses(known + lower + between + upper.replace("UR6", "URZ")) == []


def test_sound_code_is_not_reported():
    assert wrong_addresses(LOAD + USE + BASE + RIGHT) == []


def test_a_register_that_holds_something_else_by_then():
    assert wrong_addresses(LOAD + USE + REUSE + WRONG.splitlines(keepends=True)[0]) == []


def test_a_wide_product_fills_two_registers():
    wide = "        /*6c40*/                   UIMAD.WIDE.U32 UR16, UR12, 0xc8, UR4 ;    /* 0x000000c80c06 */\n"
    upper = "        /*6c80*/                   UIADD3 UR8, UR17, UR12, URZ ;    /* 0x0000000c1108 */\n"
    assert wrong_addresses(LOAD + BASE + upper)
    assert wrong_addresses(LOAD + BASE + wide + upper) == []


def test_a_register_that_nothing_has_written():
    assert wrong_addresses(LOAD + UNWRITTEN) == ["UIADD3.X UR37, UR37, -0x7fffffe0, URZ, UP0, !UPT "]
    assert wrong_addresses(LOAD + UNWRITTEN.replace("UIADD3.X UR37, UR37", "UIADD3.X UR37, URZ")) == []


def test_what_is_known_where_a_branch_leads():
    """Not what the code before it in the listing has done since; unless that goes on there."""
    branch = "        /*0020*/               @P0 BRA 0x7000 ;    /* 0x0000 */\n"
    end = "        /*6ff0*/                   EXIT ;    /* 0x000000000000794d */\n"
    copy = "        /*6c80*/                   UIADD3 UR8, UR12, 0x2, URZ ;    /* 0x00000002 */\n"
    there = copy.replace("6c80", "7000")
    assert wrong_addresses(branch + BASE + copy + there) == []
    assert wrong_addresses(branch + BASE + copy + end + there)
    assert wrong_addresses(BASE + branch + LOAD.replace("UR16", "UR12") + end + there) == []
    assert wrong_addresses(BASE + branch + LOAD.replace("UR16", "UR12") + there)


# From chunk_backward of (359, 15) in chunks of 256, by ptxas 12.9 and 13.0: R252 is the thread's number, then `length`.
THREAD = "        /*0070*/                   S2R R252, SR_TID.X ;    /* 0x0000000000fc7919 */\n"
LENGTH = (
    "        /*0b80*/                   STL [R1+0x4], R4 ;    /* 0x0000040401007387 */\n"
    "        /*8510*/                   LDL.LU R252, [R1+0x4] ;    /* 0x0000040001fc7983 */\n"
)
MASK = "        /*8660*/                   LOP3.LUT R2, R252, 0xff, RZ, 0xc0, !PT ;    /* 0x000000fffc02 */\n"
TABLE = "        /*0e90*/                   BRX R28 -0xdd0 ;    /* 0xfffffff01c1c7949 */\n"
EXIT = "        /*9000*/                   EXIT ;    /* 0x000000000000794d */\n"


def test_a_thread_number_read_from_what_a_spilled_value_was_loaded_over():
    assert defects(THREAD + LENGTH + MASK) == ["LOP3.LUT R2, R252, 0xff, RZ, 0xc0, !PT "]


def test_the_thread_number_itself_and_other_values_are_masked():
    assert defects(THREAD + MASK) == []
    assert defects(LENGTH + MASK) == []
    assert defects(THREAD + LENGTH + MASK.replace("R252", "R7")) == []
    assert defects(THREAD + LENGTH + MASK.replace("0xff", "0xc0")) == []


def test_a_spilled_thread_number_comes_back():
    spilled = LENGTH.replace("[R1+0x4], R4", "[R1+0x4], R252")
    assert defects(THREAD + spilled + MASK) == []
    elsewhere = LENGTH.splitlines(keepends=True)[1].replace("R252", "R9")
    assert defects(THREAD + spilled.splitlines(keepends=True)[0] + elsewhere + MASK.replace("R252", "R9")) == []


def test_each_part_of_a_kernel_starts_from_the_jump_to_it():
    after = MASK.replace("8660", "9010")
    assert defects(THREAD + TABLE + LENGTH + EXIT + after) == []
    assert defects(THREAD + LENGTH + TABLE + EXIT + after) == ["LOP3.LUT R2, R252, 0xff, RZ, 0xc0, !PT "]


def test_half_of_a_pair_of_registers_is_not_written_by_a_shift():
    shift = "        /*8520*/                   SHF.L.U64.HI R251, R24, 0x2, R21 ;    /* 0x0000000218d47819 */\n"
    assert defects(THREAD + shift + MASK) == []
