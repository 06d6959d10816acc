"""Properties of the block pool: the books are compared with the tables after every operation."""

from __future__ import annotations

import itertools
import random
from array import array
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.engine.blocks import DIGEST_BYTES, GROUP_BLOCKS, SPAN_BLOCKS, BlockDigests, BlockPool

NUM_BLOCKS = 2 * GROUP_BLOCKS + 1


class PoolMachine(RuleBasedStateMachine):
    """Tables of a few holders over one pool, with a plain model of which digest each block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.known: dict[bytes, int] = {}
        self.num_digests = 0

    def forget_reused(self, blocks: list[int]) -> None:
        self.known = {digest: block for digest, block in self.known.items() if block not in blocks}

    @rule(count=st.integers(0, GROUP_BLOCKS + 1), data=st.data())
    def allocate(self, count: int, data: st.DataObject) -> None:
        behind = data.draw(st.sampled_from([0, *(table[-1] for table in self.tables if table)]))
        free = self.pool.num_free
        if count > free:
            with pytest.raises(ValueError, match="are free"):
                self.pool.allocate(count, behind)
            return
        num_unknown = free - self.pool.num_cached
        blocks = self.pool.allocate(count, behind)
        assert len(set(blocks)) == count
        if count <= num_unknown:
            assert not set(blocks) & set(self.known.values()), "a remembered block went before a forgotten one"
        self.forget_reused(blocks)
        self.tables.append(blocks)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted({block for table in self.tables for block in table})))
        if block in self.known.values():
            return
        self.num_digests += 1
        digest = self.num_digests.to_bytes(DIGEST_BYTES, "big")
        self.pool.register(block, digest)
        self.known[digest] = block

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def share_a_known_block(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.known)))
        (block,) = self.pool.lookup([digest])
        assert block == self.known[digest]
        was_free = not self.pool.num_in_use([block])
        num_free = self.pool.num_free
        assert self.pool.can_hold([block], num_free - was_free)
        assert not self.pool.can_hold([block], num_free - was_free + 1)
        self.pool.share([block])
        assert self.pool.num_free == num_free - was_free
        self.tables.append([block])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @invariant()
    def books_and_tables_agree(self) -> None:
        self.pool.check(self.tables)
        in_use = {block for table in self.tables for block in table}
        num_cached = len(set(self.known.values()) - in_use)
        assert self.pool.num_cached == num_cached
        assert self.pool.num_free + len(in_use) == NUM_BLOCKS
        for digest, block in self.known.items():
            assert self.pool.lookup([digest]) == [block]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def filled(num_blocks: int) -> tuple[BlockPool, list[int], list[bytes]]:
    """A pool that holds and remembers one sequence."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(num_blocks)
    digests = [bytes([index]) * DIGEST_BYTES for index in range(num_blocks)]
    for block, digest in zip(blocks, digests):
        pool.register(block, digest)
    return pool, blocks, digests


def test_the_last_group_of_a_sequence_is_forgotten_before_those_before_it() -> None:
    pool, blocks, digests = filled(3 * GROUP_BLOCKS)
    pool.release(blocks)
    assert pool.num_cached == 3 * GROUP_BLOCKS
    assert pool.allocate(GROUP_BLOCKS + 1) == [*blocks[-GROUP_BLOCKS:], blocks[GROUP_BLOCKS]]
    assert pool.lookup(digests) == blocks[:GROUP_BLOCKS]


def grown_in_turn(pool: BlockPool, num_tables: int, length: int) -> list[list[int]]:
    tables: list[list[int]] = [[] for _ in range(num_tables)]
    for _, table in itertools.product(range(length), tables):
        table += pool.allocate(1, behind=table[-1] if table else 0)
    return tables


def num_neighbours(tables: list[list[int]]) -> int:
    return sum(second == first + 1 for table in tables for first, second in pairwise(table))


def test_tables_that_grow_in_turn_lie_in_groups_of_neighbours_again_and_again() -> None:
    pool, length = BlockPool(4 * 2 * GROUP_BLOCKS), 2 * GROUP_BLOCKS
    for number in range(3):
        tables = grown_in_turn(pool, 4, length)
        assert num_neighbours(tables) >= 4 * 2 * (GROUP_BLOCKS - 1)
        for index, block in enumerate(itertools.chain(*tables)):
            pool.register(block, f"{number} {index}".encode())
        pool.check(tables)
        assert not pool.num_free
        for table in tables:
            pool.release(table)
    assert pool.num_cached == 4 * length


def test_neighbours_that_wait_for_a_table_go_to_others_when_there_is_nothing_else() -> None:
    pool = BlockPool(GROUP_BLOCKS)
    (first,) = pool.allocate(1)
    others = pool.allocate(GROUP_BLOCKS - 1)
    assert sorted([first, *others]) == list(range(1, GROUP_BLOCKS + 1))


@pytest.mark.parametrize("seed", range(5))
def test_a_history_in_use_is_not_forgotten_for_neighbours_of_old_blocks(seed: int) -> None:
    generator, pool = random.Random(seed), BlockPool(8 * GROUP_BLOCKS)
    chat: list[bytes] = []
    num_full_turns = 0

    def visit(digests: list[bytes], num_more: int) -> int:
        hits = pool.lookup(digests)
        pool.share(hits)
        table = hits + pool.allocate(len(digests) - len(hits) + num_more, behind=hits[-1] if hits else 0)
        for block, digest in zip(table, digests):
            pool.register(block, digest)
        pool.release(table)
        return len(hits)

    for turn in range(200):
        if len(chat) > 4 * GROUP_BLOCKS:
            chat = []
        known, chat = len(chat), [*chat, *(f"chat {turn} {index}".encode() for index in range(5))]
        assert visit(chat, generator.randint(0, 1)) == known
        visit([f"{turn} {index}".encode() for index in range(generator.randint(1, GROUP_BLOCKS))], 0)
        num_full_turns += pool.num_free - pool.num_cached <= 1
    assert num_full_turns > 100, "the pool was hardly ever full"


def test_a_block_used_again_lives_longer_than_one_that_was_not() -> None:
    pool, blocks, digests = filled(2)
    pool.release(blocks)
    pool.share([blocks[1]])
    pool.release([blocks[1]])
    assert pool.allocate(1) == [blocks[0]]
    assert pool.lookup([digests[1]]) == [blocks[1]]


def test_of_two_equal_blocks_the_first_stays_the_known_one() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    digest = b"x" * DIGEST_BYTES
    pool.register(first, digest)
    pool.register(second, digest)
    pool.release([first])
    assert pool.lookup([digest]) == [first]
    pool.release([second])
    pool.check([])


def test_forgotten_blocks_are_not_found_but_kept_by_their_holders() -> None:
    pool, blocks, digests = filled(3)
    pool.release(blocks[2:])
    pool.forget(blocks[1:])
    pool.check([blocks[:2]])
    assert pool.lookup(digests) == blocks[:1]
    assert (pool.num_free, pool.num_cached) == (1, 0)


def test_releasing_twice_is_an_error() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="without a holder"):
        pool.release(blocks)


def leak(pool: BlockPool, blocks: list[int]) -> None:
    pool._num_holders[blocks[0]] += 1


def lose(pool: BlockPool, blocks: list[int]) -> None:
    pool._remembered.popitem()


def forget(pool: BlockPool, blocks: list[int]) -> None:
    pool._block_of.popitem()


def hand_out_null(pool: BlockPool, blocks: list[int]) -> None:
    pool._forgotten[0] = None


@pytest.mark.parametrize("damage", [leak, lose, forget, hand_out_null])
def test_the_check_notices_damaged_books(damage) -> None:
    pool, blocks, _ = filled(4)
    pool.release(blocks[2:])
    pool.check([blocks[:2]])
    damage(pool, blocks)
    with pytest.raises(ValueError):
        pool.check([blocks[:2]])


def digests_of(maker: BlockDigests, tokens: list[int], salt: str = "") -> list[bytes]:
    digests: list[bytes] = []
    maker.extend(digests, array("i", tokens), salt, len(tokens) // maker.block_size)
    return digests


def test_a_digest_stands_for_the_whole_prefix() -> None:
    maker = BlockDigests(4)
    one, other = digests_of(maker, [1, 2, 3, 4, 5, 6, 7, 8, 9]), digests_of(maker, [0, 2, 3, 4, 5, 6, 7, 8])
    assert len(one) == len(other) == 2
    assert one == digests_of(maker, [1, 2, 3, 4, 5, 6, 7, 8])
    assert not set(one) & set(other), "equal second blocks behind different first ones"


def test_digests_are_extended_not_made_again() -> None:
    maker = BlockDigests(2)
    tokens = array("i", range(8))
    digests: list[bytes] = []
    for num_blocks in (1, 1, 3, 4):
        maker.extend(digests, tokens, "s", num_blocks)
        assert len(digests) == num_blocks
    assert digests == digests_of(maker, list(range(8)), "s")


class Unremembered(BlockDigests):
    def _span(self, parent: bytes, content: bytes) -> list[bytes]:
        return self._chain(parent, content)


class BlindToWhatCameBefore(BlockDigests):
    def _span(self, parent: bytes, content: bytes) -> list[bytes]:
        return self._spans.setdefault(content, self._chain(parent, content))


def digests_of_chats(maker: BlockDigests) -> list[list[bytes]]:
    """Of turns of two chats whose second spans are equal, one after the other, in steps that end in the middle of spans
    too."""
    span = SPAN_BLOCKS * maker.block_size
    middle, end = [7, 8] * span, [5] * (span // 2)
    found, maker._secret = [], bytes(DIGEST_BYTES)
    for chat in ([1] * span + middle, [2] * span + middle, [1] * span + middle + end, [1] * (span // 2) + end + middle):
        tokens, digests = array("i", chat), list[bytes]()
        for num_blocks in (0, SPAN_BLOCKS, 2 * SPAN_BLOCKS + 3, len(chat) // maker.block_size):
            maker.extend(digests, tokens, "t", num_blocks)
        found.append(digests)
    return found


@pytest.mark.parametrize("max_spans", [1, 2, 100])
def test_spans_that_are_remembered_have_the_digests_of_their_blocks(max_spans: int) -> None:
    maker = BlockDigests(4, max_spans)
    assert digests_of_chats(maker) == digests_of_chats(maker) == digests_of_chats(Unremembered(4))
    assert 0 < len(maker._spans) <= max_spans
    assert digests_of_chats(BlindToWhatCameBefore(4)) != digests_of_chats(Unremembered(4))


def test_tenants_and_processes_never_share_digests() -> None:
    maker = BlockDigests(2)
    families = [digests_of(maker, [1, 2, 3, 4], salt) for salt in ("", "a", "b")]
    families.append(digests_of(BlockDigests(2), [1, 2, 3, 4]))
    assert all(len(family) == 2 for family in families)
    assert all(not set(a) & set(b) for a, b in pairwise([*families, families[0]]))
