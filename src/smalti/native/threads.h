// Work shared among the threads that torch has already started.
//
// A second OpenMP runtime in the process would fight torch's own for the cores, so none is linked: the functions of the
// one that is loaded are looked up by name. Where they are not found, and in a process forked from another, whose
// threads a fork does not copy, everything runs on the calling thread.

#pragma once

#include <dlfcn.h>
#include <sched.h>
#include <unistd.h>

namespace smalti {

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GCC's entry point; LLVM's runtime has it too
    int (*thread_num)();
    int (*num_threads)();
    pid_t process = getpid();

    OpenMP() {
        parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        thread_num = reinterpret_cast<decltype(thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
        num_threads = reinterpret_cast<decltype(num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    }
    bool usable() const { return parallel && thread_num && num_threads && process == getpid(); }
};

inline const OpenMP openmp;

// Calls body(rank, size) once on each of up to num_threads threads, rank 0 .. size - 1. The runtime may grant fewer
// than were asked for, so the work is to be cut by the size that the body is told.
template <class Body>
void parallel(int num_threads, const Body& body) {
    if (num_threads <= 1 || !openmp.usable()) {
        body(0, 1);
        return;
    }
    auto run = [](void* argument) { (*static_cast<const Body*>(argument))(openmp.thread_num(), openmp.num_threads()); };
    openmp.parallel(run, const_cast<Body*>(&body), static_cast<unsigned>(num_threads), 0);
}

// Where the threads of one parallel body wait for each other. Its memory starts as zeros.
struct Barrier {
    int arrived, round;

    void wait(int size) {
        if (size == 1) return;
        int now = __atomic_load_n(&round, __ATOMIC_RELAXED);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
            __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&round, now + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int spins = 0; __atomic_load_n(&round, __ATOMIC_ACQUIRE) == now; ++spins)
            if (spins > 2000) sched_yield();  // the other has lost its core: let it have this one
    }
};

// The share [begin, end) of `count` things that falls to `rank` of `size`.
struct Share {
    long begin, end;
    Share(long count, int rank, int size) : begin(count * rank / size), end(count * (rank + 1) / size) {}
};

}  // namespace smalti
