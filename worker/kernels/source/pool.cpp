#include "pool.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

namespace {

constexpr int NUM_SPINS = 4000;         // of a helper before it sleeps: longer than the caller takes between two kernels
constexpr int SPINS_BEFORE_YIELD = 200; // of the caller, who may be what keeps a helper from its core
constexpr uint64_t INDEX_MASK = 0xffffffff;

// The number of a job in the upper half, of its next piece in the lower. A piece is claimed by raising this number, which
// fails once another job has begun.
alignas(64) std::atomic<uint64_t> ticket{0};
alignas(64) std::atomic<int64_t> num_done{0};
alignas(64) std::atomic<uint32_t> newest_job{0};  // the address that helpers sleep on
std::atomic<int> num_asleep{0};
std::atomic<int64_t> job_count{0};
std::atomic<void (*)(void*, Pieces&)> job_work{nullptr};
std::atomic<void*> job_context{nullptr};

std::mutex owner;  // of the pool; who finds it taken works alone
std::atomic<int64_t> num_helpers{0};
std::atomic<int64_t> num_led{0};  // steps that a helper led through
std::vector<pthread_t> helpers;  // all that were started, working or not

void sleep_until_newer(uint32_t job) {
    num_asleep.fetch_add(1);
    syscall(SYS_futex, &newest_job, FUTEX_WAIT_PRIVATE, job, nullptr, nullptr, 0);
    num_asleep.fetch_sub(1);
}

void wake(int64_t count) { syscall(SYS_futex, &newest_job, FUTEX_WAKE_PRIVATE, (int)std::min<int64_t>(count, INT_MAX)); }

void pause_or_yield(int spin) {
    if (spin % SPINS_BEFORE_YIELD < SPINS_BEFORE_YIELD - 1) _mm_pause();
    else sched_yield();
}

uint32_t wait_for_job_after(uint32_t job) {
    for (int spin = 0; newest_job.load(std::memory_order_acquire) == job; ++spin) {
        if (spin < NUM_SPINS) _mm_pause();
        else sleep_until_newer(job);
    }
    return newest_job.load(std::memory_order_acquire);
}

}  // namespace

Pieces Pieces::all_of(int64_t count) {
    Pieces pieces(0, count);
    pieces.is_alone_ = true;
    return pieces;
}

bool Pieces::claim(int64_t& index) {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (seen >> 32 == job_ && (int64_t)(seen & INDEX_MASK) < count_)
        if (ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) {
            index = held_ = seen & INDEX_MASK;
            return true;
        }
    return false;
}

bool Pieces::next(int64_t& index) {
    if (is_alone_) {
        index = ++held_;
        return index < count_;
    }
    if (is_first_) {
        // was claimed before the work began
        is_first_ = false;
        index = held_;
        return true;
    }
    if (held_ >= 0) {
        held_ = -1;
        num_done.fetch_add(1, std::memory_order_acq_rel);
    }
    return claim(index);
}

namespace {

thread_local bool is_helper = false;

// What a helper leads through in its caller's place, or the caller after all where the helper gets no core.
struct Lead {
    std::atomic<bool> is_free{false}, is_over{true};
    void (*work)(void*) = nullptr;
    void* context = nullptr;

    void offer(void (*offered)(void*), void* its_context);

    bool take() {
        if (!is_free.load() || !is_free.exchange(false)) return false;
        num_led.fetch_add(is_helper);
        work(context);
        is_over.store(true);
        return true;
    }
} lead;

}  // namespace

struct Helper {
    static void run(int64_t number) {
        is_helper = true;
        for (uint32_t job = 0;;) {
            job = wait_for_job_after(job);
            if (number == 0 && lead.take()) continue;
            if (number < num_helpers.load()) take_part(job);
        }
    }

    // A job that has ended meanwhile cannot be claimed from, whatever is read of it here.
    static void take_part(uint32_t job) {
        auto work = job_work.load(std::memory_order_acquire);
        void* context = job_context.load(std::memory_order_acquire);
        Pieces pieces(job, job_count.load(std::memory_order_acquire));
        int64_t index;
        if (!pieces.claim(index)) return;
        pieces.is_first_ = true;
        work(context, pieces);
    }
};

namespace {

void start_helpers(int64_t count) {
    while ((int64_t)helpers.size() < count) {
        std::thread helper(Helper::run, (int64_t)helpers.size());
        helpers.push_back(helper.native_handle());
        helper.detach();
    }
}

// Where threads take every core each helper has one of its own, and the caller, who goes where the system puts it, the one
// that is left: a helper that wakes while a gateway is on its core would else be put behind the caller, and stay there until
// the next tick.
struct Places {
    std::vector<int> cores;  // of each helper; empty where the system places them
    int core_of_caller = -1;

    void choose(int64_t num_threads) {
        cpu_set_t allowed;
        CPU_ZERO(&allowed);
        sched_getaffinity(0, sizeof allowed, &allowed);
        for (pthread_t helper : helpers) pthread_setaffinity_np(helper, sizeof allowed, &allowed);
        cores.clear();
        if (CPU_COUNT(&allowed) != num_threads) return;
        for (int core = 0; core < CPU_SETSIZE; ++core)
            if (CPU_ISSET(core, &allowed)) cores.push_back(core);
        core_of_caller = cores.back();
        cores.pop_back();
        for (size_t number = 0; number < cores.size(); ++number) move(number, cores[number]);
    }

    // The caller is here now; the helper whose core this is gets the one that the caller has left.
    void make_way() {
        int core = sched_getcpu();
        if (cores.empty() || core == core_of_caller) return;
        for (size_t number = 0; number < cores.size(); ++number)
            if (cores[number] == core) move(number, std::exchange(core_of_caller, core));
    }

    void move(size_t number, int core) {
        cpu_set_t only;
        CPU_ZERO(&only);
        CPU_SET(core, &only);
        pthread_setaffinity_np(helpers[number], sizeof only, &only);
        cores[number] = core;
    }
} places;

std::atomic<int64_t> rest_ns{0};
constexpr int64_t STEPS_TO_REST = 16;  // a rest is to the last step as one to this

// A job of its own number, without pieces yet.
uint32_t new_job() {
    uint32_t job = newest_job.load() + 1;
    if (job == 0) job = 1;
    // a helper that is late for the last job must not take what it reads here for a part of that one
    ticket.store((uint64_t)job << 32 | INDEX_MASK);
    return job;
}

void announce(uint32_t job, int64_t num_wanted) {
    newest_job.store(job);
    if (num_asleep.load()) wake(num_wanted);
}

void Lead::offer(void (*offered)(void*), void* its_context) {
    std::lock_guard<std::mutex> lock(owner);
    places.make_way();
    work = offered, context = its_context;
    is_over.store(false), is_free.store(true);
    announce(new_job(), num_helpers.load());
}

// Work like a helper until the lead is over.
void follow() {
    uint32_t job = 0;
    for (int spin = 0; !lead.is_over.load(std::memory_order_acquire); ++spin) {
        if (lead.take()) return;
        if (newest_job.load(std::memory_order_acquire) != job) Helper::take_part(job = newest_job.load()), spin = 0;
        else pause_or_yield(spin);
    }
}

}  // namespace

void run_in_parallel(int64_t count, void (*work)(void*, Pieces&), void* context) {
    if (count <= 0) return;
    std::unique_lock<std::mutex> lock(owner, std::try_to_lock);
    if (count == 1 || num_helpers.load() == 0 || !lock.owns_lock()) {
        Pieces alone = Pieces::all_of(count);
        return work(context, alone);
    }
    if (!is_helper) places.make_way();
    uint32_t job = new_job();
    job_work.store(work), job_context.store(context), job_count.store(count);
    num_done.store(0);
    ticket.store((uint64_t)job << 32, std::memory_order_release);
    announce(job, std::min(num_helpers.load(), count - 1));
    Pieces own(job, count);
    work(context, own);
    for (int spin = 0; num_done.load(std::memory_order_acquire) < count; ++spin) pause_or_yield(spin);
}

void run_after_rest(void (*work)(void*), void* context) {
    static std::mutex only_one;
    static int64_t last_ns = 0;
    std::unique_lock<std::mutex> is_only(only_one, std::try_to_lock);
    if (!is_only.owns_lock()) return work(context);
    auto start = std::chrono::steady_clock::now();
    int64_t nanoseconds = places.cores.empty() ? 0 : std::min(rest_ns.load(), last_ns / STEPS_TO_REST);
    if (nanoseconds) {
        lead.offer(work, context);
        std::this_thread::sleep_for(std::chrono::nanoseconds(nanoseconds));
        follow();
    } else {
        work(context);
    }
    last_ns = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
}

int64_t num_threads() { return num_helpers.load() + 1; }

EXPORT void inferfleet_set_threads(int64_t count) {
    std::lock_guard<std::mutex> lock(owner);
    start_helpers(count - 1);
    num_helpers.store(count - 1);
    places.choose(count);
}

// Where threads take every core the caller of a step joins the others this much later, but by no more than a sixteenth of
// the last step: whoever carries the tokens of that one to clients has the caller's core meanwhile.
EXPORT void inferfleet_set_rest(int64_t nanoseconds) { rest_ns.store(nanoseconds); }

EXPORT int64_t inferfleet_num_led() { return num_led.load(); }
