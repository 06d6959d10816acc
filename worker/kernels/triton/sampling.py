"""From logits to tokens on a GPU: logits are read once, and where rows have top-k and the like a few times more.

`scan` cuts the vocabulary into tiles, one program each, and leaves seven numbers for every tile: largest logit and sum
of exponentials, raw and processed, and the token that is best with its noise, by what it is best and its score. Out of
these `finish` makes one token. Ranks that hold parts of the vocabulary exchange these numbers, in one collective.

For rows that cut their vocabulary `select` finds between the two which scores stay: not by sorting, but digit by digit
of a threshold's bits, by how much lies above it. Then `scan` looks at such rows once more.

What a row gets depends on that row alone, whatever else is in the batch and however that is padded: tiles follow from
the vocabulary only, and every sum has one order. Against `worker.runner.sampler`, which adds up in float64:

- The token wins whose exp(score) / -log(u) is largest, in float32. That is the one whose score - log(-log(u)) is
  largest, unless two are closer than NOISE_TOLERANCE, for scores below 64: one pick in 100,000 at most.
- What top-p, typical-p and min-p keep may differ by tokens at the edge, where a millionth of the mass or of the
  distance decides. Top-k is exact, and so is what becomes of tokens that tie: at the edge of top-p lower ids stay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.triton.ahead import Specimen
from worker.runner.device_rows import MAX_STOPS, DeviceRows, Word
from worker.runner.gpu_sampler import Processors, alternatives
from worker.runner.vocabulary import Vocabulary

NOISE_TOLERANCE = 1e-5

NUM_WORDS = tl.constexpr(len(Word))
STOPS_WIDTH = tl.constexpr(MAX_STOPS)
SAMPLES = tl.constexpr(int(Word.SAMPLES))
IS_RAW = tl.constexpr(int(Word.IS_RAW))
IS_OPENAI = tl.constexpr(int(Word.IS_OPENAI))
NUM_PROMPT = tl.constexpr(int(Word.NUM_PROMPT))
MIN_TOKENS = tl.constexpr(int(Word.MIN_TOKENS))
NUM_STOPS = tl.constexpr(int(Word.NUM_STOPS))
SLOT = tl.constexpr(int(Word.SLOT))
TOP_K = tl.constexpr(int(Word.TOP_K))
SEED_LOW = tl.constexpr(int(Word.SEED_LOW))
SEED_HIGH = tl.constexpr(int(Word.SEED_HIGH))
TEMPERATURE = tl.constexpr(int(Word.TEMPERATURE))
TOP_P = tl.constexpr(int(Word.TOP_P))
TYPICAL_P = tl.constexpr(int(Word.TYPICAL_P))
MIN_P = tl.constexpr(int(Word.MIN_P))
REPETITION = tl.constexpr(int(Word.REPETITION))
FREQUENCY = tl.constexpr(int(Word.FREQUENCY))
PRESENCE = tl.constexpr(int(Word.PRESENCE))

# planes of what `scan` leaves of each tile, [planes, places, tiles]; floats by their bits
RAW_MAX, RAW_SUM, MAX, SUM, BEST, VALUE, ID = (tl.constexpr(plane) for plane in range(7))
NUM_PLANES = tl.constexpr(7)

# what `select` leaves of each row, [places, bounds]; the limit by its bits
LOW, LIMIT, CENTRE, RADIUS = (tl.constexpr(bound) for bound in range(4))
NUM_BOUNDS = tl.constexpr(4)

ALL_IDS = tl.constexpr(2**31 - 1)
LOWEST_ORDER = tl.constexpr(-(2**31))
ORDER_OF_MINUS_INFINITY = tl.constexpr(-(2**31) + 0x7FFFFF)
NUM_ROUGH = tl.constexpr(5)
EACH_TOKEN, MASS, MASS_BY_DISTANCE = (tl.constexpr(kind) for kind in range(3))

SCAN_TILE = 2048
"""8 numbers for each of 256 threads, which leaves registers for two programs on a processor, and 63 programs for one
row of 128,000 tokens."""

SCAN_WARPS = 8

SELECT_TILE = 2048
"""One program goes through a row again and again, out of the second-level cache, with 512 threads."""
SELECT_WARPS = 16

LIST_LENGTH = 8192
"""More candidates than thresholds usually have, and less than what a processor's first-level cache holds."""

SLICES = ["rows", "output_indices", "tops"]
"""Begin anywhere in the step's numbers, and are read one by one: where must not decide what is compiled."""

EXACT = {"enable_fp_fusion": False}
"""Products and sums of penalties are rounded one by one, as the CPU's are."""


@triton.jit
def row_of(place, rows, output_indices, parameters, floats, stops):
    """What processors must know of the row at `place`, as `scores_of` takes it."""
    row = tl.load(rows + place)
    words, reals = parameters + row * NUM_WORDS, floats + row * NUM_WORDS
    index = tl.load(output_indices + place)
    num_held = tl.where(index < tl.load(words + MIN_TOKENS), tl.load(words + NUM_STOPS), 0)
    temperature = tl.where(tl.load(words + SAMPLES) != 0, tl.load(reals + TEMPERATURE), 1.0)
    length = tl.maximum(tl.load(words + NUM_PROMPT) + index, 1).to(tl.float32)
    is_openai = tl.load(words + IS_OPENAI) != 0
    divisor = tl.where(is_openai, 1.0, length)
    repetition, frequency = tl.load(reals + REPETITION), tl.load(reals + FREQUENCY)
    presence, slot = tl.load(reals + PRESENCE), tl.load(words + SLOT)
    held = stops + row * STOPS_WIDTH
    return num_held, held, temperature, divisor, is_openai, repetition, frequency, presence, slot


@triton.jit
def scores_of(raw, ids, is_here, row, counts, vocab_size):
    """Logits `raw` float32 of the tokens `ids` after minimum length, penalties and temperature."""
    num_held, held, temperature, divisor, is_openai, repetition, frequency, presence, slot = row
    scores = raw
    stop = 0
    while stop < num_held:
        scores = tl.where(ids == tl.load(held + stop), -float("inf"), scores)
        stop += 1
    if slot >= 0:
        both = counts + slot.to(tl.int64) * 2 * vocab_size
        everywhere = tl.load(both + ids, mask=is_here, other=0)
        output = tl.load(both + vocab_size + ids, mask=is_here, other=0)
        penalised = tl.where(scores < 0, scores * repetition, tl.div_rn(scores, repetition))
        scores = tl.where(everywhere > 0, penalised, scores)
        number = tl.where(is_openai, output, everywhere).to(tl.float32)
        scores -= frequency * tl.div_rn(number, divisor)
        scores -= tl.where(number > 0, presence, 0.0)
    if temperature != 1.0:
        scores = tl.div_rn(scores, temperature)
    return scores


@triton.jit
def is_cut(words, reals, vocab_size):
    """Whether a row weighs tokens against each other."""
    top_k = tl.load(words + TOP_K)
    cuts = ((top_k > 0) & (top_k < vocab_size)) | (tl.load(reals + TOP_P) < 1.0)
    cuts = cuts | (tl.load(reals + TYPICAL_P) < 1.0) | (tl.load(reals + MIN_P) > 0.0)
    return cuts & (tl.load(words + SAMPLES) != 0)


@triton.jit
def kept(scores, ids, low, limit, centre, radius):
    """Which scores are above `low`, or equal it with an id up to `limit`, and within `radius` of `centre`."""
    is_high = (scores > low) | ((scores == low) & (ids <= limit))
    return is_high & (tl.abs(scores - centre) <= radius)


@triton.jit
def cut(scores, ids, bounds):
    """`scores` of one row by the `bounds` that `select` left of it."""
    limit = tl.load(bounds + LIMIT).to(tl.int32, bitcast=True)
    is_kept = kept(scores, ids, tl.load(bounds + LOW), limit, tl.load(bounds + CENTRE), tl.load(bounds + RADIUS))
    return tl.where(is_kept, scores, -float("inf"))


@triton.jit
def random_words(first_id, seed_low, seed_high, index, TILE: tl.constexpr):
    """uint32 of the TILE tokens from `first_id` on, a multiple of four: Philox4x32-10 as `worker.runner.noise` has it.
    About 80 operations for four tokens."""
    a = (first_id >> 2).to(tl.uint32) + tl.arange(0, TILE // 4).to(tl.uint32)
    c = tl.zeros_like(a)
    b, d = c + index.to(tl.uint32, bitcast=True), c
    low, high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        left, right = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, b = (right >> 32).to(tl.uint32) ^ b ^ low, right.to(tl.uint32)
        c, d = (left >> 32).to(tl.uint32) ^ d ^ high, left.to(tl.uint32)
        low += 0x9E3779B9
        high += 0xBB67AE85
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def exponentials(words):
    """-log(u) of random words, u as in `worker.runner.noise`: what becomes Gumbel noise by one more logarithm."""
    return -tl.log(((words >> 9).to(tl.float32) + 0.5) * (2.0**-23))


@triton.jit(do_not_specialize_on_alignment=SLICES)
def scan(
    logits,
    stride,
    rows,
    output_indices,
    parameters,
    floats,
    stops,
    counts,
    bounds,
    partials,
    partial_floats,
    first_id,
    num_columns,
    vocab_size,
    AFTER_CUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Seven numbers of one tile of one place's logits. Grid [places, tiles].

    `logits` [places, num_columns] of the ids from `first_id` on. Without AFTER_CUT the raw numbers of all places, and
    the processed ones of those without cuts; with it the processed ones of the others, out of what `bounds` keeps.

    Reads num_columns * (size of a logit) bytes a row, 8 bytes a token more with penalties; writes 28 bytes a tile.
    About 15 operations a token, 50 more where it samples.
    """
    place, tile = tl.program_id(0), tl.program_id(1)
    num_places, num_tiles = tl.num_programs(0), tl.num_programs(1)
    row = tl.load(rows + place)
    words, reals = parameters + row * NUM_WORDS, floats + row * NUM_WORDS
    cuts = is_cut(words, reals, vocab_size)
    if AFTER_CUT:  # noqa: SIM102 (the outer one is for the compiler)
        if not cuts:
            return
    # noise comes in fours of ids, whichever of them is the first here
    base = (first_id // 4) * 4 + tile * TILE
    lanes = tl.arange(0, TILE)
    ids = base + lanes
    is_here = (ids >= first_id) & (ids < first_id + num_columns)
    mine = logits + place.to(tl.int64) * stride
    raw = tl.load(mine + (ids - first_id), mask=is_here, other=-float("inf")).to(tl.float32)
    out, plane = place * num_tiles + tile, num_places * num_tiles
    if not AFTER_CUT:
        most = tl.max(raw, 0)
        safe = tl.where(most == -float("inf"), 0.0, most)
        tl.store(partial_floats + RAW_MAX * plane + out, most)
        tl.store(partial_floats + RAW_SUM * plane + out, tl.sum(tl.exp(raw - safe), 0))
        if cuts:
            return
    state = row_of(place, rows, output_indices, parameters, floats, stops)
    scores = scores_of(raw, ids, is_here, state, counts, vocab_size)
    if AFTER_CUT:
        scores = cut(scores, ids, bounds + place * NUM_BOUNDS)
    most = tl.max(scores, 0)
    safe = tl.where(most == -float("inf"), 0.0, most)
    weights = tl.exp(scores - safe)
    samples = tl.load(words + SAMPLES) != 0
    keyed = scores
    if samples:
        seed_low, seed_high = tl.load(words + SEED_LOW), tl.load(words + SEED_HIGH)
        random = random_words(base, seed_low, seed_high, tl.load(output_indices + place), TILE)
        keyed = weights / exponentials(random)
    # numbers that are none spoil the sums, which is noticed, and must not spoil what is picked
    best, lane = tl.max(tl.where(keyed == keyed, keyed, -float("inf")), 0, return_indices=True)
    if samples:
        best = safe + tl.log(tl.maximum(best, 0.0))
    wanted = tl.where(tl.load(words + IS_RAW) != 0, raw, scores)
    tl.store(partial_floats + MAX * plane + out, most)
    tl.store(partial_floats + SUM * plane + out, tl.sum(weights, 0))
    tl.store(partial_floats + BEST * plane + out, best)
    tl.store(partial_floats + VALUE * plane + out, tl.sum(tl.where(lanes == lane, wanted, 0.0), 0))
    tl.store(partials + ID * plane + out, base + lane)


@triton.jit
def float_of(order):
    """The float32 at this place of all of them in ascending order, an int32."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kept_scores(start, mine, row, counts, low, limit, centre, radius, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Of the TILE tokens from `start` on of the row with logits at `mine`: scores, -inf where not kept, and ids."""
    ids = start + tl.arange(0, TILE)
    is_here = ids < VOCAB
    raw = tl.load(mine + ids, mask=is_here, other=-float("inf")).to(tl.float32)
    scores = scores_of(raw, ids, is_here, row, counts, VOCAB)
    return tl.where(kept(scores, ids, low, limit, centre, radius), scores, -float("inf")), ids


@triton.jit
def threshold(
    kind,
    target,
    most,
    mine,
    candidates,
    row,
    counts,
    low,
    limit,
    centre,
    radius,
    LIST: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest number such that what is not below it weighs at least `target`: -inf where all together does not.

    `kind` EACH_TOKEN: scores, each weighs one. MASS: scores, by their exponentials. MASS_BY_DISTANCE: minus the
    distance of scores from `centre`, by their exponentials.

    A pass over the row gives two bits of 32. After five, which know the number up to half of its size, what is not
    below them is listed at `candidates` if that is LIST tokens at most, and the other passes are over these.
    """
    order, number, is_listed = (
        tl.full((), LOWEST_ORDER, tl.int32),
        tl.full((), VOCAB, tl.int32),
        tl.full((), 0, tl.int1),
    )
    lanes = tl.arange(0, TILE)
    for level in range(16):
        if level == NUM_ROUGH:
            floor, num_listed = float_of(order), tl.full((), 0, tl.int32)
            for start in range(0, VOCAB, TILE):
                scores, _ = kept_scores(start, mine, row, counts, low, limit, centre, radius, VOCAB, TILE)
                is_candidate = (values_of(scores, centre, kind) >= floor).to(tl.int32)
                places = num_listed + tl.cumsum(is_candidate, 0) - 1
                tl.store(candidates + places, scores, mask=(is_candidate > 0) & (places < LIST))
                num_listed += tl.sum(is_candidate, 0)
            # what one thread has listed all are to read
            tl.debug_barrier()
            is_listed = (num_listed > 0) & (num_listed <= LIST)
            number = tl.where(is_listed, num_listed, number)
        step = tl.full((), 1 << 30, tl.int32) >> (2 * level)
        one, two, three = float_of(order + step), float_of(order + 2 * step), float_of(order + 3 * step)
        # lane by lane first: one sum across threads at the end of a pass instead of one for each tile
        above_one = tl.zeros((TILE,), tl.float32)
        above_two, above_three = above_one, above_one
        for start in range(0, number, TILE):
            if is_listed:
                scores = tl.load(candidates + start + lanes, mask=start + lanes < number, other=-float("inf"))
            else:
                scores, _ = kept_scores(start, mine, row, counts, low, limit, centre, radius, VOCAB, TILE)
            values = values_of(scores, centre, kind)
            weights = tl.where(kind == EACH_TOKEN, 1.0, tl.exp(scores - most))
            above_one += tl.where(values >= one, weights, 0.0)
            above_two += tl.where(values >= two, weights, 0.0)
            above_three += tl.where(values >= three, weights, 0.0)
        # the largest that passes, not their number: below -inf are bits of no number, which nothing reaches
        digit = tl.where(tl.sum(above_one, 0) >= target, 1, 0)
        digit = tl.where(tl.sum(above_two, 0) >= target, 2, digit)
        digit = tl.where(tl.sum(above_three, 0) >= target, 3, digit)
        order += digit * step
    return tl.where(order < ORDER_OF_MINUS_INFINITY, -float("inf"), float_of(order))


@triton.jit
def values_of(scores, centre, kind):
    """By what `threshold` orders tokens with these scores."""
    return tl.where(kind == MASS_BY_DISTANCE, -tl.abs(scores - centre), scores)


@triton.jit(do_not_specialize_on_alignment=SLICES)
def select(
    logits,
    stride,
    rows,
    output_indices,
    parameters,
    floats,
    stops,
    counts,
    bounds,
    lists,
    LIST: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """What top-k, top-p, typical-p and min-p keep of the rows that have any of them, as `kept` takes it. Grid [places].

    Reads the row's logits (and counts) 8 times for top-k, 10 for top-p, 8 for typical-p, twice for min-p: the first
    time out of memory, VOCAB * (size of a logit) bytes. Reads 11 times `lists` [places, LIST], or where LIST is too
    short the row. About 30 operations a token and pass.
    """
    place = tl.program_id(0)
    at = tl.load(rows + place)
    words, reals = parameters + at * NUM_WORDS, floats + at * NUM_WORDS
    if not is_cut(words, reals, VOCAB):
        return
    row = row_of(place, rows, output_indices, parameters, floats, stops)
    mine, candidates = logits + place.to(tl.int64) * stride, lists + place * LIST
    low, limit = tl.full((), -float("inf"), tl.float32), tl.full((), ALL_IDS, tl.int32)
    centre, radius = tl.full((), 0.0, tl.float32), tl.full((), float("inf"), tl.float32)

    largest = tl.full((TILE,), -float("inf"), tl.float32)
    for start in range(0, VOCAB, TILE):
        scores, _ = kept_scores(start, mine, row, counts, low, limit, centre, radius, VOCAB, TILE)
        largest = tl.maximum(largest, scores)
    most = tl.max(largest, 0)
    most = tl.where(most == -float("inf"), 0.0, most)

    top_k, top_p, typical_p = tl.load(words + TOP_K), tl.load(reals + TOP_P), tl.load(reals + TYPICAL_P)
    for kind in range(3):
        asks = ((kind == EACH_TOKEN) & (top_k > 0) & (top_k < VOCAB)) | ((kind == MASS) & (top_p < 1.0))
        if asks | ((kind == MASS_BY_DISTANCE) & (typical_p < 1.0)):
            masses, moments = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
            for start in range(0, VOCAB, TILE):
                scores, _ = kept_scores(start, mine, row, counts, low, limit, centre, radius, VOCAB, TILE)
                weights = tl.exp(scores - most)
                masses += weights
                moments += tl.where(weights > 0, weights * (scores - most), 0.0)
            mass = tl.sum(masses, 0)
            target = tl.where(kind == EACH_TOKEN, top_k.to(tl.float32), tl.where(kind == MASS, top_p, typical_p) * mass)
            if kind == MASS_BY_DISTANCE:
                # surprise minus entropy is the mean of all scores minus the token's own
                centre = most + tl.div_rn(tl.sum(moments, 0), mass)
            edge = threshold(
                kind, target, most, mine, candidates, row, counts, low, limit, centre, radius, LIST, VOCAB, TILE
            )
            if kind == MASS_BY_DISTANCE:
                radius = -edge
            elif (edge >= low) & (edge > -float("inf")):
                low = edge
                if kind == MASS:
                    limit = last_of_ties(target, edge, most, mine, row, counts, VOCAB, TILE)

    min_p = tl.load(reals + MIN_P)
    if min_p > 0.0:
        largest = tl.full((TILE,), -float("inf"), tl.float32)
        for start in range(0, VOCAB, TILE):
            scores, _ = kept_scores(start, mine, row, counts, low, limit, centre, radius, VOCAB, TILE)
            largest = tl.maximum(largest, scores)
        edge = tl.max(largest, 0) + tl.log(min_p)
        if edge > low:
            low = edge
            limit = tl.full((), ALL_IDS, tl.int32)

    out = bounds + place * NUM_BOUNDS
    tl.store(out + LOW, low)
    tl.store(out + LIMIT, limit.to(tl.float32, bitcast=True))
    tl.store(out + CENTRE, centre)
    tl.store(out + RADIUS, radius)


@triton.jit
def last_of_ties(target, edge, most, mine, row, counts, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Of the tokens whose score is `edge` the last id that is needed to reach the mass `target`, at least the first."""
    masses, ties = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.int32)
    everything, anywhere = -float("inf"), float("inf")
    for start in range(0, VOCAB, TILE):
        scores, _ = kept_scores(start, mine, row, counts, everything, ALL_IDS, 0.0, anywhere, VOCAB, TILE)
        masses += tl.where(scores > edge, tl.exp(scores - most), 0.0)
        ties += tl.where(scores == edge, 1, 0)
    missing = tl.div_rn(target - tl.sum(masses, 0), tl.exp(edge - most))
    wanted = tl.maximum(tl.ceil(tl.minimum(missing, 1.0 * VOCAB)), 1.0).to(tl.int32)
    limit = tl.full((), ALL_IDS, tl.int32)
    if wanted < tl.sum(ties, 0):
        num_before = tl.full((), 0, tl.int32)
        for start in range(0, VOCAB, TILE):
            scores, ids = kept_scores(start, mine, row, counts, everything, ALL_IDS, 0.0, anywhere, VOCAB, TILE)
            is_tie = (scores == edge).to(tl.int32)
            number = num_before + tl.cumsum(is_tie, 0)
            limit = tl.minimum(limit, tl.min(tl.where((is_tie > 0) & (number == wanted), ids, ALL_IDS), 0))
            num_before += tl.sum(is_tie, 0)
    return limit


@triton.jit
def normaliser(maxima, sums, is_here):
    """The log-sum-exp of a row out of those of its tiles; not finite where the row is of no use."""
    most_of = tl.load(maxima, mask=is_here, other=-float("inf"))
    most = tl.max(most_of, 0)
    most = tl.where(most == -float("inf"), 0.0, most)
    return most + tl.log(tl.sum(tl.load(sums, mask=is_here, other=0.0) * tl.exp(most_of - most), 0))


@triton.jit(do_not_specialize_on_alignment=SLICES)
def finish(
    partials,
    partial_floats,
    rows,
    parameters,
    last_ids,
    counts,
    answer,
    answer_floats,
    normalisers,
    num_ranks,
    num_tiles,
    vocab_size,
    LANES: tl.constexpr,
):
    """One token a place out of what `scan` left, on all ranks, [ranks, planes, places, tiles], and remember it.

    Grid [places]. Writes `answer`: ids, log-probabilities by their bits, and whether they are usable, [3, places]; and
    what was subtracted for the log-probabilities, `normalisers` [places]. Reads 28 bytes a tile.
    """
    place, num_places = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, LANES)
    is_here = lanes < num_ranks * num_tiles
    plane = num_places * num_tiles
    at = (lanes // num_tiles * NUM_PLANES * num_places + place) * num_tiles + lanes % num_tiles
    tiles = partial_floats + at
    raw = normaliser(tiles + RAW_MAX * plane, tiles + RAW_SUM * plane, is_here)
    processed = normaliser(tiles + MAX * plane, tiles + SUM * plane, is_here)
    # tiles and ranks ascend with their ids: of equals the first is the lowest
    best = tl.load(tiles + BEST * plane, mask=is_here, other=-float("inf"))
    _, winner = tl.max(best, 0, return_indices=True)
    is_winner = lanes == winner
    token = tl.sum(tl.where(is_winner, tl.load(partials + at + ID * plane, mask=is_here, other=0), 0), 0)
    value = tl.sum(tl.where(is_winner, tl.load(tiles + VALUE * plane, mask=is_here, other=0.0), 0.0), 0)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
    row = tl.load(rows + place)
    subtracted = tl.where(tl.load(parameters + row * NUM_WORDS + IS_RAW) != 0, raw, processed)
    is_usable = (tl.abs(raw) < float("inf")) & (tl.abs(processed) < float("inf"))
    tl.store(answer + place, token)
    tl.store(answer_floats + num_places + place, value - subtracted)
    tl.store(answer + 2 * num_places + place, is_usable.to(tl.int32))
    tl.store(normalisers + place, subtracted)
    tl.store(last_ids + row, token)
    slot = tl.load(parameters + row * NUM_WORDS + SLOT)
    if slot >= 0:
        both = counts + slot.to(tl.int64) * 2 * vocab_size + token
        tl.store(both, tl.load(both) + 1)
        tl.store(both + vocab_size, tl.load(both + vocab_size) + 1)


@triton.jit(do_not_specialize_on_alignment=SLICES)
def wanted_scores(
    logits,
    stride,
    rows,
    output_indices,
    parameters,
    floats,
    stops,
    counts,
    bounds,
    tops,
    out,
    vocab_size,
    CUTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """All scores of the places `tops`, raw or processed as each wants, [places of tops, vocab]. Grid [places, tiles].

    Before `finish`, which counts one token more. Reads what `scan` reads, writes 4 bytes a token.
    """
    top, tile = tl.program_id(0), tl.program_id(1)
    place = tl.load(tops + top)
    at = tl.load(rows + place)
    words, reals = parameters + at * NUM_WORDS, floats + at * NUM_WORDS
    ids = tile * TILE + tl.arange(0, TILE)
    is_here = ids < vocab_size
    scores = tl.load(logits + place.to(tl.int64) * stride + ids, mask=is_here, other=-float("inf")).to(tl.float32)
    if tl.load(words + IS_RAW) == 0:
        row = row_of(place, rows, output_indices, parameters, floats, stops)
        scores = scores_of(scores, ids, is_here, row, counts, vocab_size)
        if CUTS:  # noqa: SIM102 (the outer one is for the compiler)
            if is_cut(words, reals, vocab_size):
                scores = cut(scores, ids, bounds + place * NUM_BOUNDS)
    tl.store(out + top.to(tl.int64) * vocab_size + ids, scores, mask=is_here)


class _Step:
    """The launches of one step, whose places share where their rows' state lies."""

    def __init__(self, state: DeviceRows, logits: Tensor, words: Tensor) -> None:
        self._state, self._num_places, self._vocab_size = state, len(logits), state.vocab_size
        rows, indices = words[: len(logits)], words[len(logits) : 2 * len(logits)]
        self._rows, self.tops = rows, words[2 * len(logits) :]
        self._bounds = torch.empty((len(logits), NUM_BOUNDS.value), dtype=torch.float32, device=logits.device)
        floats = state.parameters.view(torch.float32)
        self._common = (logits, logits.stride(0), rows, indices, state.parameters, floats, state.stops, state.counts)

    def scan(self, ids: range, num_tiles: int, tile: int, processors: Processors) -> Tensor:
        """int32 [planes, places, tiles] of the logits, which are those of `ids`."""
        grid = (self._num_places, num_tiles)
        partials = torch.empty((NUM_PLANES.value, *grid), dtype=torch.int32, device=self._rows.device)
        places = (self._bounds, partials, partials.view(torch.float32), ids.start, len(ids), self._vocab_size)
        scan[grid](*self._common, *places, AFTER_CUT=False, TILE=tile, num_warps=SCAN_WARPS, **EXACT)
        if processors.cuts:
            size = _tile(self._vocab_size, SELECT_TILE)
            lists = torch.empty((self._num_places, LIST_LENGTH), dtype=torch.float32, device=self._rows.device)
            options = {"VOCAB": self._vocab_size, "TILE": size, "num_warps": SELECT_WARPS, **EXACT}
            select[(self._num_places,)](*self._common, self._bounds, lists, LIST=LIST_LENGTH, **options)
            scan[grid](*self._common, *places, AFTER_CUT=True, TILE=tile, num_warps=SCAN_WARPS, **EXACT)
        return partials

    def wanted_scores(self, processors: Processors) -> Tensor:
        """float32 [places of tops, vocab]."""
        scores = torch.empty((len(self.tops), self._vocab_size), dtype=torch.float32, device=self._rows.device)
        tile = _tile(self._vocab_size, SCAN_TILE)
        grid = (len(self.tops), triton.cdiv(self._vocab_size, tile))
        rest = (self._bounds, self.tops, scores, self._vocab_size)
        wanted_scores[grid](*self._common, *rest, CUTS=processors.cuts, TILE=tile, num_warps=SCAN_WARPS, **EXACT)
        return scores

    def finish(self, everyone: Tensor) -> tuple[Tensor, Tensor]:
        """The answer but for alternatives, and the normalisers, out of what `scan` left on all ranks."""
        num_ranks, _, _, num_tiles = everyone.shape
        answer = torch.empty(3 * self._num_places, dtype=torch.int32, device=everyone.device)
        normalisers = torch.empty(self._num_places, dtype=torch.float32, device=everyone.device)
        state = (self._rows, self._state.parameters, self._state.last_ids, self._state.counts)
        finish[(self._num_places,)](
            everyone,
            everyone.view(torch.float32),
            *state,
            answer,
            answer.view(torch.float32),
            normalisers,
            num_ranks,
            num_tiles,
            self._vocab_size,
            LANES=triton.next_power_of_2(num_ranks * num_tiles),
            num_warps=1,
        )
        return answer, normalisers


class TritonSampler:
    """A `Sampler` for logits of 16 or 32 bits. Ranks exchange what `scan` leaves of their parts; but all logits of a
    step in which some row has cuts or wants alternatives."""

    def __init__(self, state: DeviceRows, vocabulary: Vocabulary) -> None:
        self._state, self._vocabulary = state, vocabulary

    def __call__(self, logits: Tensor, words: Tensor, processors: Processors) -> Tensor:
        vocabulary, ids, is_split = self._vocabulary, self._vocabulary.mine, self._vocabulary.is_split
        has_tops = len(words) > 2 * len(logits)
        if is_split and (processors.cuts or has_tops):
            logits, ids, is_split = vocabulary.gather(logits), range(vocabulary.size), False
        step = _Step(self._state, logits, words)
        # all ranks have as many tiles as the one with most ids could have, wherever in a group of four they begin
        width = -(-vocabulary.size // vocabulary.group.shard.size) + 3 if is_split else len(ids)
        tile = _tile(width, SCAN_TILE)
        partials = step.scan(ids, triton.cdiv(width, tile), tile, processors)
        everyone = vocabulary.group.all_gather(partials) if is_split else partials[None]
        scores = step.wanted_scores(processors) if has_tops else None
        answer, normalisers = step.finish(everyone)
        if scores is None:
            return answer
        scores -= normalisers.index_select(0, step.tops)[:, None]
        return torch.cat([answer, *alternatives(scores)])


def _tile(width: int, largest: int) -> int:
    return min(largest, 1 << (max(width, 16) - 1).bit_length())


def specimens() -> list[Specimen]:
    """Decoding with the vocabulary of Llama 3; logits are of the model's type."""
    width = "i32:16"
    rows = dict.fromkeys(("rows", "output_indices", "parameters", "stops", "counts"), "*i32")
    rows |= {"floats": "*fp32", "stride": width}
    tiles = {"partials": "*i32", "partial_floats": "*fp32"}
    step = {"logits": "*bf16", "bounds": "*fp32", **rows}
    part = {**step, **tiles, "first_id": width, "num_columns": width, "vocab_size": width}
    tile, after = {"AFTER_CUT": False, "TILE": SCAN_TILE}, {"AFTER_CUT": True, "TILE": SCAN_TILE}
    row = {"LIST": LIST_LENGTH, "VOCAB": 128_256, "TILE": SELECT_TILE}
    whole, cuts = {**step, "tops": "*i32", "out": "*fp32", "vocab_size": width}, {"CUTS": True, "TILE": SCAN_TILE}
    last = {"rows": "*i32", "parameters": "*i32", "last_ids": "*i32", "counts": "*i32", "answer": "*i32"}
    last |= {"answer_floats": "*fp32", "normalisers": "*fp32", "num_ranks": "i32", "num_tiles": "i32", **tiles}
    last["vocab_size"] = width
    return [
        Specimen("bf16", scan, part, tile, is_decode=True, num_warps=SCAN_WARPS),
        Specimen("fp32", scan, {**part, "logits": "*fp32"}, tile, is_decode=True, num_warps=SCAN_WARPS),
        Specimen("bf16 after a cut", scan, part, after, is_decode=True, num_warps=SCAN_WARPS),
        Specimen("bf16", select, {**step, "lists": "*fp32"}, row, is_decode=True, num_warps=SELECT_WARPS),
        Specimen("bf16", wanted_scores, whole, cuts, is_decode=True, num_warps=SCAN_WARPS),
        Specimen("64 tiles", finish, last, {"LANES": 64}, is_decode=True, num_warps=1),
    ]
