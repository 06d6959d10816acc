// Memory of a thread for what is between two steps of a kernel, or between kernels.

#pragma once

#include <cstddef>
#include <cstdlib>
#include <sys/mman.h>

// It only grows, and what was in it is lost when it does. Each `Purpose`, a type, has its own.
template <class Purpose>
void* scratch(size_t bytes) {
    constexpr size_t SMALL = 4096, LARGE = 2 << 20;
    static thread_local void* memory = nullptr;
    static thread_local size_t size = 0;
    if (size < bytes) {
        free(memory);
        size_t page = bytes < LARGE ? SMALL : LARGE;
        size = (bytes + page - 1) / page * page;
        memory = aligned_alloc(page, size);
        if (page == LARGE) madvise(memory, size, MADV_HUGEPAGE);
    }
    return memory;
}
