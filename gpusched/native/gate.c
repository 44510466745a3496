/* The gate: which threads are in the driver, and how all of them are kept outside.
 *
 * Each thread says for itself whether it is inside, in memory of its own: going in and out costs one locked
 * instruction. The closer sets one word and looks at all threads until none is inside. No thread is interrupted.
 */
#define _GNU_SOURCE
#include "direct.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

_Atomic uint32_t gate_closed = 0;
__thread struct thread *self __attribute__((tls_model("initial-exec"))) = NULL;

static _Atomic(struct thread *) threads;
static pthread_key_t leaving;
static pthread_once_t prepared = PTHREAD_ONCE_INIT;

enum { POLL_NS = 50 * 1000, PAGE = 4096 };

static long futex(_Atomic uint32_t *word, int operation, uint32_t value) {
    return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

/* A thread ends: its place is free for the next one. Also where it was cancelled within the driver. */
static void leave_for_good(void *place) {
    struct thread *thread = place;
    self = NULL;
    thread->depth = 0;
    thread->exempt = false;
    atomic_store(&thread->inside, 0);
    atomic_store(&thread->taken, 0);
}

static void prepare(void) {
    pthread_key_create(&leaving, leave_for_good);
}

static struct thread *take(struct thread *thread) {
    for (; thread != NULL; thread = thread->next) {
        uint32_t free_ = 0;
        if (atomic_compare_exchange_strong(&thread->taken, &free_, 1))
            return thread;
    }
    return NULL;
}

struct thread *gate_join(void) {
    int saved = errno;
    pthread_once(&prepared, prepare);
    struct thread *thread = take(atomic_load(&threads));
    if (thread == NULL) {
        /* Not from malloc: a program may have put its own in, which may call CUDA. */
        struct thread *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (page == MAP_FAILED)
            abort(); /* without a place nobody could be held; the program is out of memory anyway */
        size_t count = PAGE / sizeof *page;
        for (size_t i = 0; i + 1 < count; i++)
            page[i].next = &page[i + 1];
        page[0].taken = 1;
        struct thread *first = atomic_load(&threads);
        do
            page[count - 1].next = first;
        while (!atomic_compare_exchange_weak(&threads, &first, page));
        thread = page;
    }
    self = thread;
    pthread_setspecific(leaving, thread);
    errno = saved;
    return thread;
}

void gate_wait(struct thread *thread, _Atomic uint32_t *word) {
    int saved = errno;
    do {
        atomic_store(&thread->inside, 0);
        while (atomic_load(word))
            futex(word, FUTEX_WAIT, 1);
        while (atomic_load(&gate_closed))
            futex(&gate_closed, FUTEX_WAIT, 1);
        atomic_exchange(&thread->inside, 1);
    } while (atomic_load(&gate_closed));
    errno = saved;
}

void gate_wake(_Atomic uint32_t *word) {
    atomic_exchange(word, 0);
    futex(word, FUTEX_WAKE, INT_MAX);
}

static bool anybody_inside(void) {
    for (struct thread *thread = atomic_load(&threads); thread != NULL; thread = thread->next)
        if (!thread->exempt && atomic_load(&thread->inside))
            return true;
    return false;
}

bool gate_close(unsigned timeout_ms) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const int64_t until = now.tv_sec * 1000000000LL + now.tv_nsec + timeout_ms * 1000000LL;
    atomic_exchange(&gate_closed, 1);
    while (anybody_inside()) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec * 1000000000LL + now.tv_nsec >= until) {
            gate_open();
            return false;
        }
        nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
    return true;
}

void gate_open(void) {
    gate_wake(&gate_closed);
}

void gate_exempt(void) {
    struct thread *thread = self != NULL ? self : gate_join();
    thread->exempt = true;
}

void gate_after_fork(void) {
    for (struct thread *thread = atomic_load(&threads); thread != NULL; thread = thread->next)
        if (thread != self) {
            thread->depth = 0;
            thread->exempt = false;
            atomic_store(&thread->inside, 0);
            atomic_store(&thread->taken, 0);
        }
    atomic_store(&gate_closed, 0);
}
