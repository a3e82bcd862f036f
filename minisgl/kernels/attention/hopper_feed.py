"""What programs of the Hopper kernel work on: their items, and keys and values brought to them.

Partitions agree on items by working them out alike; only the producer reads the page table.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

HALF = gl.constexpr(64)  # columns of a head that a swizzled row holds

# Triton 3.9 renames the copy.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _request(
    pool, table_row, buffer, full, tile, stage, end, column, PAGE: gl.constexpr, BN: gl.constexpr
):
    """Asks for keys (or values) tile * BN on; what lies beyond `end` comes from page 0."""
    BOX: gl.constexpr = PAGE if PAGE < BN else BN
    mbarrier.expect(full.index(stage), BN * 2 * HALF * 2)
    for part in gl.static_range(BN // BOX):
        key = tile * BN + part * BOX
        page = gl.load(table_row + key // PAGE, mask=key < end, other=0)
        slot = page * PAGE + key % PAGE
        for half in gl.static_range(2):
            to = buffer.index(2 * stage + half).slice(part * BOX, BOX, 0)
            tma_load(pool, [slot, column + half * HALF], full.index(stage), to)


@gluon.jit
def laps(tiles_ptr, HK: gl.constexpr):
    """Items of a program: an item is a tile of queries, of those listed, of a key head."""
    return gl.cdiv(gl.load(tiles_ptr) * HK, gl.num_programs(0))


@gluon.jit
def item_of(
    lap, tiles_ptr, offsets_ptr, lengths_ptr, HK: gl.constexpr, TOKENS: gl.constexpr,
    BN: gl.constexpr,
):  # fmt: skip
    """(sequence, key head, first query, where its queries begin, their number, the first query's
    position, end and tiles of keys) of a program's item in a lap.

    Items fall in length, so laps run forwards and backwards by turns: what programs compute is then
    alike. In the last lap some programs have none; an item of no tiles stands for that.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    item = lap * programs + gl.where(lap % 2 == 0, program, programs - 1 - program)
    there = item < gl.load(tiles_ptr) * HK
    at = tiles_ptr + 2 + item // HK * 2  # neighbours share a sequence's pages
    sequence = gl.load(at, mask=there, other=0)
    first = gl.load(at + 1, mask=there, other=0) * TOKENS
    begin = gl.load(offsets_ptr + sequence)
    queries = gl.load(offsets_ptr + sequence + 1) - begin
    length = gl.load(lengths_ptr + sequence)
    earliest = length - queries + first
    end = gl.minimum(length, earliest + TOKENS)
    # A tile that shows nothing gives 0.
    tiles = gl.where(there, gl.maximum(gl.cdiv(end, BN), 1), 0)
    return sequence, item % HK, first, begin, queries, earliest, end, tiles


@gluon.jit
def produce(
    k_pool, v_pool, table_ptr, rows_ptr, tiles_ptr, offsets_ptr, lengths_ptr, k_buffer, v_buffer,
    k_full, k_empty, v_full, v_empty, table_stride,
    HK: gl.constexpr, TOKENS: gl.constexpr, PAGE: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    done = 0  # tiles of keys of the items before
    for lap in range(laps(tiles_ptr, HK)):
        sequence, kv_head, _, _, _, _, end, tiles = item_of(
            lap, tiles_ptr, offsets_ptr, lengths_ptr, HK, TOKENS, BN
        )
        table_row = table_ptr + gl.load(rows_ptr + sequence).to(gl.int64) * table_stride
        column = kv_head * (2 * HALF)
        for tile in range(tiles):
            stage = (done + tile) % STAGES
            free = (((done + tile) // STAGES) & 1) ^ 1  # at once for a stage's first use
            mbarrier.wait(k_empty.index(stage), free)
            _request(k_pool, table_row, k_buffer, k_full, tile, stage, end, column, PAGE, BN)
            mbarrier.wait(v_empty.index(stage), free)
            _request(v_pool, table_row, v_buffer, v_full, tile, stage, end, column, PAGE, BN)
        done += tiles
