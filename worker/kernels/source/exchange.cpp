// What the ranks of one machine add up and collect, through memory that they share.
//
//     seats of all ranks │ rank 0: part of even rounds, of odd ones │ rank 1: …
//
// In a round every rank writes its part, says so in its seat, and reads the parts of all once they have said so too. Who says
// so in one round has read all parts of the round before: what it reads in this one is written over in the next but one.

#include "activations.h"
#include "kernels.h"
#include "pool.h"

#include <algorithm>
#include <atomic>

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace {

constexpr int64_t PIECE_BYTES = 1 << 18;  // of a part, which is exchanged piece by piece: caches hold one of all ranks
constexpr int64_t BLOCK_BYTES = 1 << 15;  // less is not worth another thread
constexpr int NUM_SPINS = 4000;           // before a rank sleeps: longer than others take who began with it
constexpr int SPINS_BEFORE_YIELD = 100;   // the other rank may be waiting for this core
constexpr timespec LONGEST_SLEEP = {0, 50'000'000};  // then it looks whether the other one still lives

struct alignas(128) Seat {
    std::atomic<uint32_t> round;  // the newest whose part is there; the address that others sleep on
    std::atomic<uint32_t> num_asleep;
};

int64_t seat_bytes(int64_t size) { return ceil_div(size * sizeof(Seat), 4096) * 4096; }

}  // namespace

struct Exchange {
    int fd;
    int64_t rank, size;
    char* memory;
    uint32_t round;

    Seat& seat(int64_t of) const { return ((Seat*)memory)[of]; }
    char* part(int64_t of) const { return memory + seat_bytes(size) + (2 * of + round % 2) * PIECE_BYTES; }
};

namespace {

// Each rank locks the byte of its number, and the system unlocks it when the process ends, however that happens.
struct flock lock_of(int64_t rank) {
    struct flock lock = {};
    lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = rank, lock.l_len = 1;
    return lock;
}

bool is_gone(const Exchange& own, int64_t rank) {
    struct flock lock = lock_of(rank);
    return fcntl(own.fd, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

bool has_come(const Exchange& own, int64_t rank) {
    return (int32_t)(own.seat(rank).round.load(std::memory_order_acquire) - own.round) >= 0;
}

void sleep_until_it_comes(const Exchange& own, int64_t rank) {
    Seat& seat = own.seat(rank);
    seat.num_asleep.fetch_add(1);
    uint32_t seen = seat.round.load();
    if ((int32_t)(seen - own.round) < 0) syscall(SYS_futex, &seat.round, FUTEX_WAIT, seen, &LONGEST_SLEEP, nullptr, 0);
    seat.num_asleep.fetch_sub(1);
}

// False if it ended without having come.
bool wait_for(const Exchange& own, int64_t rank) {
    for (int spin = 0; spin < NUM_SPINS; ++spin) {
        if (has_come(own, rank)) return true;
        if (spin % SPINS_BEFORE_YIELD < SPINS_BEFORE_YIELD - 1) _mm_pause();
        else sched_yield();
    }
    for (;;) {
        sleep_until_it_comes(own, rank);
        if (has_come(own, rank)) return true;
        if (is_gone(own, rank)) return has_come(own, rank);
    }
}

void come(const Exchange& own) {
    Seat& seat = own.seat(own.rank);
    seat.round.store(own.round);
    if (seat.num_asleep.load()) syscall(SYS_futex, &seat.round, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

// Calls `read(at, size)` for pieces of the parts, once they are there. False if a rank is gone.
template <class Read>
bool exchange(Exchange& own, const void* part, int64_t num_bytes, const Read& read) {
    for (int64_t at = 0; at < num_bytes; at += PIECE_BYTES) {
        int64_t size = std::min(PIECE_BYTES, num_bytes - at);
        ++own.round;
        memcpy(own.part(own.rank), (const char*)part + at, size);
        come(own);
        for (int64_t rank = 0; rank < own.size; ++rank)
            if (!wait_for(own, rank)) return false;
        read(at, size);
    }
    return true;
}

// In the order of ranks and rounded once, so that all have the same bits.
template <class T>
bool add_up(Exchange& own, const T* part, const T* residual, T* out, int64_t count) {
    constexpr int64_t BLOCK = BLOCK_BYTES / sizeof(T);
    return exchange(own, part, count * sizeof(T), [&](int64_t begin, int64_t num_bytes) {
        int64_t first = begin / sizeof(T), size = num_bytes / sizeof(T);
        for_each_in_parallel(ceil_div(size, BLOCK), [&](int64_t block) {
            for (int64_t at = block * BLOCK, end = std::min(at + BLOCK, size); at < end; at += LANES) {
                int64_t few = std::min<int64_t>(LANES, end - at);
                floats total = load_some((const T*)own.part(0) + at, few);
                for (int64_t rank = 1; rank < own.size; ++rank) total += load_some((const T*)own.part(rank) + at, few);
                if (residual) total = rounded(part, total) + load_some(residual + first + at, few);
                store_some(out + first + at, total, few);
            }
        });
    });
}

}  // namespace

// The exchange of `rank`, one of `size`, over the memory of a file that is theirs alone; null where the system has no such
// memory or locks. The process must neither close `fd` nor another one of that file, which would unlock what it locked.
EXPORT Exchange* inferfleet_open_exchange(int64_t fd, int64_t rank, int64_t size) {
    int64_t num_bytes = seat_bytes(size) + 2 * size * PIECE_BYTES;
    struct flock lock = lock_of(rank);
    if (ftruncate(fd, num_bytes) || fcntl(fd, F_SETLK, &lock)) return nullptr;
    void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return memory == MAP_FAILED ? nullptr : new Exchange{(int)fd, rank, size, (char*)memory, 0};
}

// out[count] = sum of the parts of all ranks, plus residual[count] where there is one; `out` may be `part`. False if a rank
// is gone, and nobody can go on.
EXPORT bool inferfleet_add_up_f32(Exchange* own, const float* part, const float* residual, float* out, int64_t count) {
    return add_up(*own, part, residual, out, count);
}

EXPORT bool inferfleet_add_up_bf16(Exchange* own, const bf16* part, const bf16* residual, bf16* out, int64_t count) {
    return add_up(*own, part, residual, out, count);
}

// all[rank][num_bytes] = the parts of all ranks. False as above.
EXPORT bool inferfleet_gather(Exchange* own, const char* part, int64_t num_bytes, char* all) {
    return exchange(*own, part, num_bytes, [&](int64_t at, int64_t size) {
        for (int64_t rank = 0; rank < own->size; ++rank) memcpy(all + rank * num_bytes + at, own->part(rank), size);
    });
}
