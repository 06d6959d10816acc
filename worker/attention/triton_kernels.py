"""The kernels of worker/attention/triton.py, which says what they are given.

One kernel for all: queries of a row and the query heads that share a kv head stand below each other in a tile, whose
products with a tile of keys are done at once; softmax is kept up while the tiles of keys pass (FlashAttention-2, Dao,
arXiv 2307.08691). Scores are in float32, to the base of 2. Long rows may be cut along their keys (Flash-Decoding, Dao
et al., 2023), and what the parts give is put together by a second kernel.
"""

# annotations must stay objects: Triton reads `tl.constexpr` from them
import triton
import triton.language as tl

LOG2_OF_E = tl.constexpr(1.4426950408889634)

AS_THEY_ARE = tl.constexpr(0)
E4M3_BITS = tl.constexpr(1)
MULTIPLES = tl.constexpr(2)
"""Kinds of pages: numbers of a type that this GPU knows, float8_e4m3fn as bytes, int8 with a scale."""

ROWS_AT_A_TIME = tl.constexpr(128)


@triton.jit
def _find_row(tile, query_starts, num_rows, TILE_QUERIES: tl.constexpr):
    """The row that `tile` belongs to, and its first query of it.

    Row i owns the tiles from query_starts[i] // TILE_QUERIES + i on. That may be one more than it has, so that where
    they begin needs no sum over the rows before.
    """
    num_begun = 0
    for first in range(0, num_rows, ROWS_AT_A_TIME):
        row = first + tl.arange(0, ROWS_AT_A_TIME)
        begin = tl.load(query_starts + row, mask=row < num_rows, other=0)
        num_begun += tl.sum(((row < num_rows) & (begin // TILE_QUERIES + row <= tile)).to(tl.int32))
    row = num_begun - 1
    return row, (tile - tl.load(query_starts + row) // TILE_QUERIES - row) * TILE_QUERIES


@triton.jit
def _pages_of(table, first, end, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """The page of each of BLOCK_N keys from `first` on; one for all of them where they share it."""
    if PAGE_SIZE >= BLOCK_N:
        pages = tl.load(table + first // PAGE_SIZE, mask=first < end, other=0)
    else:
        keys = first + tl.arange(0, BLOCK_N)
        pages = tl.load(table + keys // PAGE_SIZE, mask=keys < end, other=0)
    return pages


@triton.jit
def _read(pages, places, is_key, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr):
    """What lies at `places` as TYPE, [places, BLOCK_D]; zeros where there is no key or the head has ended."""
    dims = tl.arange(0, BLOCK_D)
    is_there = is_key[:, None] & (dims < HEAD_DIM)[None, :]
    stored = tl.load(pages + places[:, None] + dims[None, :], mask=is_there, other=0.0)
    if KIND == E4M3_BITS:
        bits = stored.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), half).to(TYPE)
    if KIND == MULTIPLES:
        low = tl.load(pages + places + HEAD_DIM, mask=is_key, other=0).to(tl.int16) & 0xFF
        high = tl.load(pages + places + HEAD_DIM + 1, mask=is_key, other=0).to(tl.int16)
        scale = ((high << 8) | low).to(tl.bfloat16, bitcast=True).to(tl.float32)
        return (stored.to(tl.float32) * scale[:, None]).to(TYPE)
    return stored.to(TYPE)


@triton.jit(do_not_specialize=["num_rows"])
def attention_kernel(
    q,
    k_pages,
    v_pages,
    out,
    parts,
    part_logs,
    rows,
    query_starts,
    starts,
    num_keys,
    tables,
    slopes,
    bias,
    scale,
    softcap,
    window,
    reach,
    num_rows,
    q_stride,
    page_stride,
    place_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    MIN_QUERIES: tl.constexpr,
):
    """Attention of rows of at least MIN_QUERIES tokens; with MIN_QUERIES = 1 of those that are no longer than a tile.

    The program's first index is the kv head, within the tile of queries; the second one is the part of the keys. What
    is None is left out when the kernel is compiled: `num_keys` (causal), `slopes`, `bias`, `softcap`, `window`, and
    `parts` float32 [rows, TILE_QUERIES, heads, parts, d] with `part_logs` [..., parts], which take the place of `out`.

    For a row of n queries and m keys, with g heads of d in h groups, pages of b bytes a number: 4 n m g h d operations
    (half of it if causal and n = m), and h * ceil(n g / BLOCK_M) * 2 m d b bytes of keys and values. Decoding it is
    bound by these bytes: g operations for each of them in 16 bits.
    """
    TILE_QUERIES: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    if MIN_QUERIES == 1:
        row, first_query = tl.program_id(0) // NUM_KV_HEADS, 0
    else:
        row, first_query = _find_row(tl.program_id(0) // NUM_KV_HEADS, query_starts, num_rows, TILE_QUERIES)
    begin = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - begin
    if (count < MIN_QUERIES) | (first_query >= count):
        return
    if (MIN_QUERIES == 1) & (count > TILE_QUERIES):
        return

    lane = tl.arange(0, BLOCK_M)
    query, head = first_query + lane // GROUP, kv_head * GROUP + lane % GROUP
    is_query = (lane < TILE_QUERIES * GROUP) & (query < count)
    start = tl.load(starts + row)
    position = start + query
    first_key, end = 0, start + tl.minimum(first_query + TILE_QUERIES, count)
    if num_keys is not None:
        end = tl.load(num_keys + row)
    if window is not None:
        first_key = tl.maximum(start + first_query + 1 - window, 0)
    first_tile, end_tile = first_key // BLOCK_N, tl.cdiv(end, BLOCK_N)
    place = begin.to(tl.int64) + query
    if parts is not None:
        part, num_parts = tl.program_id(1), tl.num_programs(1)
        place = ((row.to(tl.int64) * TILE_QUERIES + query) * NUM_KV_HEADS * GROUP + head) * num_parts + part
        tiles_per_part = tl.cdiv(end_tile - first_tile, num_parts)
        first_tile += part * tiles_per_part
        end_tile = tl.minimum(end_tile, first_tile + tiles_per_part)
        if first_tile >= end_tile:
            tl.store(part_logs + place, float("-inf"), mask=is_query)
            return

    dims = tl.arange(0, BLOCK_D)
    is_number = is_query[:, None] & (dims < HEAD_DIM)[None, :]
    q_places = (begin.to(tl.int64) + query) * q_stride + head * HEAD_DIM
    tile_of_q = tl.load(q + q_places[:, None] + dims[None, :], mask=is_number, other=0)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=is_query, other=0) * LOG2_OF_E
    table = tables + tl.load(rows + row).to(tl.int64) * table_stride
    shift = kv_head * (HEAD_DIM + 2 if KIND == MULTIPLES else HEAD_DIM)
    page = _pages_of(table, first_tile * BLOCK_N, end, BLOCK_N, PAGE_SIZE)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(first_tile * BLOCK_N, end_tile * BLOCK_N, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        is_key = (keys < end) & (keys >= first_key)
        places = shift + page.to(tl.int64) * page_stride + (keys % PAGE_SIZE) * place_stride
        # asked for a turn ahead, since keys can only be asked for when it has come
        page = _pages_of(table, first + BLOCK_N, end, BLOCK_N, PAGE_SIZE)
        k = _read(k_pages, places, is_key, BLOCK_D, HEAD_DIM, KIND, tile_of_q.dtype)
        scores = tl.dot(tile_of_q, tl.trans(k), input_precision="ieee") * (scale * LOG2_OF_E)
        if softcap is not None:
            # tanh(x) = 1 - 2 / (e^2x + 1)
            scores = (1 - 2 / (tl.exp2(scores * (2 / softcap)) + 1)) * (softcap * LOG2_OF_E)
        if slopes is not None:
            scores += slope[:, None] * (keys[None, :] - position[:, None])
        if bias is not None:
            distance = tl.minimum(tl.maximum(keys[None, :] - position[:, None], -reach), reach)
            added = bias + head[:, None] * (2 * reach + 1) + reach + distance
            scores += tl.load(added, mask=is_query[:, None], other=0.0) * LOG2_OF_E
        is_visible = keys[None, :] <= position[:, None] if num_keys is None else is_key[None, :]
        if window is not None:
            is_visible = is_visible & (keys[None, :] > position[:, None] - window)
        scores = tl.where(is_visible, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        # a query may see none of the keys so far
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        v = _read(v_pages, places, is_key, BLOCK_D, HEAD_DIM, KIND, tile_of_q.dtype)
        result = tl.dot(weights.to(v.dtype), v, result * shrink[:, None], input_precision="ieee")
        largest = larger

    result = result / tl.where(total == 0, 1.0, total)[:, None]
    if parts is not None:
        tl.store(part_logs + place, largest + tl.log2(total), mask=is_query)
        tl.store(parts + place[:, None] * HEAD_DIM + dims[None, :], result, mask=is_number)
    else:
        place = place * (NUM_KV_HEADS * GROUP) + head
        tl.store(out + place[:, None] * HEAD_DIM + dims[None, :], result.to(out.dtype.element_ty), mask=is_number)


@triton.jit(do_not_specialize=["num_parts"])
def combine_kernel(
    parts,
    part_logs,
    out,
    query_starts,
    num_parts,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """What the parts of a row's keys gave, [rows, TILE_QUERIES, heads, parts, d], weighted by the sums of their
    exponentials, whose logarithms to the base of 2 are `part_logs`: [tokens, heads, d]. One program for each vector.

    4 d (parts + 1/2) bytes and 2 d parts operations for each query and head in 16 bits.
    """
    head, row, query = tl.program_id(1), tl.program_id(0) // TILE_QUERIES, tl.program_id(0) % TILE_QUERIES
    begin = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - begin
    if (query >= count) | (count > TILE_QUERIES):
        return
    part, dims = tl.arange(0, MAX_PARTS), tl.arange(0, BLOCK_D)
    places = (tl.program_id(0).to(tl.int64) * NUM_HEADS + head) * num_parts + part
    logs = tl.load(part_logs + places, mask=part < num_parts, other=float("-inf"))
    largest = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(largest == float("-inf"), 0.0, largest))
    # a part without keys has written nothing but its logarithm
    is_there = (logs != float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
    values = tl.load(parts + places[:, None] * HEAD_DIM + dims[None, :], mask=is_there, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(values * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    place = (begin.to(tl.int64) + query) * NUM_HEADS + head
    tl.store(out + place * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
