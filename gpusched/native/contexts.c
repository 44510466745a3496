/* Which contexts a program uses, and which devices reach the memory of which others.
 *
 * A context is noted when it allocates, makes or maps memory, or is given access to another device's. All of them are
 * waited for before memory leaves. What the driver's own cuMemAlloc makes can be copied between any two devices, and be
 * reached from those that were given access. Of what ours makes, each device that has a context reaches all; where
 * devices cannot reach each other, nothing is made.
 */
#define _GNU_SOURCE
#include "direct.h"

enum { MOST = 64, INVALID_CONTEXT = 201, ALREADY_ENABLED = 704, CONTEXT_IS_DESTROYED = 709, SPOILED = 901 };

static struct {
    CUcontext context;
    CUdevice device;
} contexts[MOST];
static size_t count;
static _Atomic uint64_t present; /* devices that have a context */

static bool is_noted(CUcontext context) {
    for (size_t i = 0; i < count; i++)
        if (contexts[i].context == context)
            return true;
    return false;
}

/* With the lock held. Whether its device had none before. */
static bool note(CUcontext context, CUdevice device) {
    if (count == MOST || is_noted(context))
        return false;
    contexts[count].context = context;
    contexts[count++].device = device;
    return (atomic_fetch_or(&present, 1ull << device) >> device & 1) == 0;
}

void context_note(void) {
    CUcontext current = NULL;
    CUdevice device;
    if (driver.cuCtxGetCurrent(&current) != CUDA_SUCCESS || current == NULL)
        return;
    table_lock();
    bool known = is_noted(current);
    table_unlock();
    if (known || driver.cuCtxGetDevice(&device) != CUDA_SUCCESS || device < 0 || device >= 64)
        return;
    table_lock();
    bool is_new = note(current, device);
    table_unlock();
    if (is_new)
        memory_allow(device);
}

static void forget(CUcontext context) {
    uint64_t left = 0;
    table_lock();
    for (size_t i = 0; i < count;)
        if (contexts[i].context == context)
            contexts[i] = contexts[--count];
        else
            left |= 1ull << contexts[i++].device;
    atomic_store(&present, left);
    table_unlock();
}

CUcontext context_of(CUdevice device) {
    for (size_t i = 0; i < count; i++)
        if (contexts[i].device == device)
            return contexts[i].context;
    return NULL;
}

CUresult contexts_synchronize(void) {
    CUresult result = CUDA_SUCCESS;
    for (size_t i = 0; i < count && result == CUDA_SUCCESS; i++) {
        result = driver.cuCtxSetCurrent(contexts[i].context);
        if (result == INVALID_CONTEXT || result == CONTEXT_IS_DESTROYED)
            result = CUDA_SUCCESS; /* and has no work */
        else if (result == CUDA_SUCCESS)
            result = driver.cuCtxSynchronize();
    }
    return result;
}

static _Atomic uint32_t captures, held;

void captures_hold(bool wanted) {
    if (wanted)
        atomic_store(&held, 1);
    else
        gate_wake(&held);
}

void capture_wait(void) {
    while (atomic_load(&held))
        gate_wait(self, &held);
}

CUresult capture_begun(CUresult result) {
    if (result == CUDA_SUCCESS)
        atomic_fetch_add(&captures, 1);
    return result;
}

CUresult capture_ended(CUresult result) {
    uint32_t before = atomic_load(&captures);
    if (result == CUDA_SUCCESS || result == SPOILED)
        while (before > 0 && !atomic_compare_exchange_weak(&captures, &before, before - 1))
            ;
    return result;
}

bool captures_are_on(void) {
    return atomic_load(&captures) > 0;
}

uint64_t devices_present(void) {
    return atomic_load(&present);
}

static bool look_whether_all_reach_all(void) {
    int devices = 0;
    if (driver.cuDeviceGetCount(&devices) != CUDA_SUCCESS || devices > 64)
        return false;
    for (CUdevice one = 0; one < devices; one++)
        for (CUdevice other = 0; other < devices; other++) {
            int can = one == other;
            if (!can && (driver.cuDeviceCanAccessPeer(&can, one, other) != CUDA_SUCCESS || !can))
                return false;
        }
    return true;
}

bool devices_reach_each_other(void) {
    static _Atomic int known; /* 1: yes, 2: no */
    int answer = atomic_load_explicit(&known, memory_order_relaxed);
    if (answer == 0) {
        answer = look_whether_all_reach_all() ? 1 : 2;
        atomic_store_explicit(&known, answer, memory_order_relaxed);
    }
    return answer == 1;
}

CUresult peer_enable(CUcontext peer, unsigned flags) {
    CUresult result = driver.cuCtxEnablePeerAccess(peer, flags);
    if (result == CUDA_SUCCESS || result == ALREADY_ENABLED)
        context_note();
    return result;
}

CUresult context_destroy(CUcontext context) {
    CUresult result = driver.cuCtxDestroy(context);
    if (result == CUDA_SUCCESS) {
        forget(context);
        memory_end(context);
    }
    return result;
}

void contexts_after_fork(void) {
    count = 0;
    atomic_store(&captures, 0);
    atomic_store(&held, 0);
    atomic_store(&present, 0);
}
