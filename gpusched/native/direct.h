/* What the parts of libgpusched_direct share. See docs/line-rate.md for how they work together.
 *
 * The library is preloaded into programs that may use CUDA. It backs their device memory by the driver's virtual memory
 * calls, so that another process can be given the memory itself, and it can hold all threads outside the driver.
 */
#ifndef GPUSCHED_DIRECT_H
#define GPUSCHED_DIRECT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HIDDEN __attribute__((visibility("hidden")))
#define PUBLIC __attribute__((visibility("default")))
#define LIKELY(x) __builtin_expect(!!(x), 1)

/* -- the driver's types, as far as they are needed here (its headers are not) ------------------------------------- */

typedef int CUresult;
typedef int CUdevice;
typedef void *CUcontext;
typedef unsigned long long CUdeviceptr;
typedef unsigned long long CUhandle;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
    CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103,
    CU_MEM_ALLOCATION_TYPE_PINNED = 1,
    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1,
    CU_MEM_LOCATION_TYPE_DEVICE = 1,
    CU_MEM_ACCESS_READWRITE = 3,
};

struct location {
    int type, id;
};

struct allocation_properties {
    int type;
    int handle_types;
    struct location location;
    void *win32_metadata;
    unsigned char compression, rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
};

struct access {
    struct location location;
    int flags;
};

/* The driver's own functions, whoever else wraps them. Found by driver_load. */
struct driver {
    CUresult (*cuInit)(unsigned);
    CUresult (*cuGetProcAddress)(const char *, void **, int, uint64_t, void *);
    CUresult (*cuCtxGetCurrent)(CUcontext *);
    CUresult (*cuCtxSetCurrent)(CUcontext);
    CUresult (*cuCtxGetDevice)(CUdevice *);
    CUresult (*cuCtxSynchronize)(void);
    CUresult (*cuDeviceGetAttribute)(int *, int, CUdevice);
    CUresult (*cuDeviceGetUuid)(void *, CUdevice);
    CUresult (*cuMemcpyHtoD)(CUdeviceptr, const void *, size_t);
    CUresult (*cuMemAlloc)(CUdeviceptr *, size_t);
    CUresult (*cuMemFree)(CUdeviceptr);
    CUresult (*cuMemCreate)(CUhandle *, size_t, const struct allocation_properties *, uint64_t);
    CUresult (*cuMemRelease)(CUhandle);
    CUresult (*cuMemAddressReserve)(CUdeviceptr *, size_t, size_t, CUdeviceptr, uint64_t);
    CUresult (*cuMemAddressFree)(CUdeviceptr, size_t);
    CUresult (*cuMemMap)(CUdeviceptr, size_t, size_t, CUhandle, uint64_t);
    CUresult (*cuMemUnmap)(CUdeviceptr, size_t);
    CUresult (*cuMemSetAccess)(CUdeviceptr, size_t, const struct access *, size_t);
    CUresult (*cuMemExportToShareableHandle)(void *, CUhandle, int, uint64_t);
};
extern struct driver driver HIDDEN;

/* -- entry.c: every way into the driver --------------------------------------------------------------------------- */

/* The dynamic linker's own dlsym. */
HIDDEN void *real_dlsym(void *library, const char *name);

/* -- gate.c: threads in the driver, and holding them outside ------------------------------------------------------ */

/* One for each thread that ever called the driver, in a list that only grows. */
struct thread {
    _Alignas(64) _Atomic uint32_t inside; /* whether it may be in the driver now */
    uint32_t depth;                       /* calls within calls */
    bool exempt;                          /* the control thread */
    _Atomic uint32_t taken;
    struct thread *next;
};
extern __thread struct thread *self HIDDEN __attribute__((tls_model("initial-exec")));
extern _Atomic uint32_t gate_closed HIDDEN;

HIDDEN struct thread *gate_join(void);
HIDDEN void gate_wait(struct thread *thread);

static inline struct thread *gate_enter(void) {
    struct thread *thread = self;
    if (!LIKELY(thread))
        thread = gate_join();
    if (thread->depth++ == 0 && !thread->exempt) {
        /* A full barrier: either the closer sees us inside, or we see the gate closed. */
        atomic_exchange(&thread->inside, 1);
        if (!LIKELY(atomic_load(&gate_closed) == 0))
            gate_wait(thread);
    }
    return thread;
}

static inline void gate_leave(struct thread *thread) {
    if (--thread->depth == 0)
        atomic_store_explicit(&thread->inside, 0, memory_order_release);
}

/* Whether every thread is outside within the time; else it is open again. */
HIDDEN bool gate_close(unsigned timeout_ms);
HIDDEN void gate_open(void);
HIDDEN void gate_exempt(void);
/* In the child of a fork: only the calling thread is left. */
HIDDEN void gate_after_fork(void);

/* -- memory.c: device memory of our own making -------------------------------------------------------------------- */

struct memory {
    CUdeviceptr address; /* 0: free */
    size_t size;
    CUcontext context;
    CUdevice device;
    uint8_t gpu[16]; /* the device's UUID, when this was made */
    CUhandle handle; /* 0 while the contents are elsewhere */
    bool mapped;
    int fd;          /* the exported handle, which keeps the memory alive; -1: none */
};

struct table {
    struct memory *items;
    size_t count, room; /* of items, free ones included */
    size_t bytes;
};
extern struct table table HIDDEN;

HIDDEN CUresult memory_alloc(CUdeviceptr *address, size_t size);
HIDDEN CUresult memory_free(CUdeviceptr address);
/* The rest is the control thread's, while the gate is closed. */
HIDDEN CUresult memory_synchronize(void);
HIDDEN CUresult memory_export(struct memory *memory);
HIDDEN CUresult memory_unmap(struct memory *memory);
HIDDEN CUresult memory_create(struct memory *memory);
HIDDEN CUresult memory_map(struct memory *memory);
HIDDEN void memory_drop_fd(struct memory *memory);
HIDDEN void memory_after_fork(void);

/* -- control.c: the thread that does what the daemon asks --------------------------------------------------------- */

/* After the first cuInit that succeeded. */
HIDDEN void control_start(void);
HIDDEN void control_after_fork(void);

#endif
