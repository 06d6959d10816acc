// The threads that share a kernel's work.
//
// A processor that serves has more to do than this: gateway, Redis and clients take cores away in the middle of a step.
// So nobody waits for a thread that has not begun: work is claimed piece by piece, and the caller, who works too, waits for
// pieces that others hold alone. (A barrier of OpenMP waits for every thread to be given a core first.)

#pragma once

#include <atomic>
#include <cstdint>

// The pieces 0 to count - 1 of one job, of which each thread takes the next one when it has done one.
class Pieces {
  public:
    // False when there are no more. What was taken before is done then.
    bool next(int64_t& index);

    // Those of a job that is one thread's alone.
    static Pieces all_of(int64_t count);

  private:
    friend struct Helper;
    friend void run_in_parallel(int64_t, void (*)(void*, Pieces&), void*);
    explicit Pieces(uint64_t job, int64_t count) : job_(job), count_(count) {}
    bool claim(int64_t& index);

    uint64_t job_;
    int64_t count_;
    int64_t held_ = -1;
    bool is_alone_ = false;
    bool is_first_ = false;
};

void run_in_parallel(int64_t count, void (*work)(void*, Pieces&), void* context);

// Call `work(pieces)` on some threads, this one among them, until all pieces are done. What threads write to different
// places needs no lock; they see what was written before the call.
template <class Work>
void in_parallel(int64_t count, const Work& work) {
    run_in_parallel(count, [](void* context, Pieces& pieces) { (*(const Work*)context)(pieces); }, (void*)&work);
}

// The same without other threads.
template <class Work>
void in_this_thread(int64_t count, const Work& work) {
    Pieces pieces = Pieces::all_of(count);
    work(pieces);
}

template <class Work>
void for_each_in_parallel(int64_t count, const Work& work) {
    in_parallel(count, [&](Pieces& pieces) {
        for (int64_t index; pieces.next(index);) work(index);
    });
}

int64_t num_threads();

// Run `work`, which calls the above. The caller may join in only after a rest, while a helper leads.
void run_after_rest(void (*work)(void*), void* context);
