// Memory of a thread for what is between two steps of a kernel, or between kernels.

#pragma once

#include <cstddef>
#include <cstdlib>
#include <sys/mman.h>

// It only grows, and what was in it is lost when it does. Each `Purpose`, a type, has its own. What takes large pages is
// mapped apart: an allocator would keep each smaller one that was before it as a hole.
template <class Purpose>
void* scratch(size_t bytes) {
    constexpr size_t SMALL = 4096, LARGE = 2 << 20;
    static thread_local void *memory = nullptr, *mapped = nullptr;
    static thread_local size_t size = 0;
    if (size >= bytes) return memory;
    if (mapped) munmap(mapped, size + LARGE);
    else free(memory);
    if (bytes < LARGE) {
        size = (bytes + SMALL - 1) / SMALL * SMALL;
        return memory = aligned_alloc(SMALL, size);
    }
    size = (bytes + LARGE - 1) / LARGE * LARGE;
    mapped = mmap(nullptr, size + LARGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory = (void*)(((size_t)mapped + LARGE - 1) / LARGE * LARGE);
    madvise(memory, size, MADV_HUGEPAGE);
    return memory;
}
