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

struct ipc_handle {
    char data[64];
};

/* The driver's own functions, whoever else wraps them. Found by driver_load. */
struct driver {
    CUresult (*cuInit)(unsigned);
    CUresult (*cuGetProcAddress)(const char *, void **, int, uint64_t, void *);
    CUresult (*cuCtxGetCurrent)(CUcontext *);
    CUresult (*cuCtxSetCurrent)(CUcontext);
    CUresult (*cuCtxGetDevice)(CUdevice *);
    CUresult (*cuCtxSynchronize)(void);
    CUresult (*cuStreamBeginCapture_v2)(void *, int);
    CUresult (*cuStreamBeginCapture_v2_ptsz)(void *, int);
    CUresult (*cuStreamBeginCaptureToGraph)(void *, void *, const void *, const void *, size_t, int);
    CUresult (*cuStreamBeginCaptureToGraph_ptsz)(void *, void *, const void *, const void *, size_t, int);
    CUresult (*cuStreamEndCapture)(void *, void *);
    CUresult (*cuStreamEndCapture_ptsz)(void *, void *);
    CUresult (*cuCtxEnablePeerAccess)(CUcontext, unsigned);
    CUresult (*cuCtxDestroy)(CUcontext);
    CUresult (*cuDeviceGetCount)(int *);
    CUresult (*cuDeviceCanAccessPeer)(int *, CUdevice, CUdevice);
    CUresult (*cuDeviceGetAttribute)(int *, int, CUdevice);
    CUresult (*cuDeviceGetUuid)(void *, CUdevice);
    CUresult (*cuMemcpyHtoD)(CUdeviceptr, const void *, size_t);
    CUresult (*cuMemAlloc)(CUdeviceptr *, size_t);
    CUresult (*cuMemFree)(CUdeviceptr);
    CUresult (*cuMemCreate)(CUhandle *, size_t, const struct allocation_properties *, uint64_t);
    CUresult (*cuMemRelease)(CUhandle);
    CUresult (*cuMemRetainAllocationHandle)(CUhandle *, void *);
    CUresult (*cuMemImportFromShareableHandle)(CUhandle *, void *, int);
    CUresult (*cuMemGetAllocationPropertiesFromHandle)(struct allocation_properties *, CUhandle);
    CUresult (*cuMemGetHandleForAddressRange)(void *, CUdeviceptr, size_t, int, uint64_t);
    CUresult (*cuIpcGetMemHandle)(void *, CUdeviceptr);
    CUresult (*cuIpcOpenMemHandle)(CUdeviceptr *, struct ipc_handle, unsigned);
    CUresult (*cuIpcCloseMemHandle)(CUdeviceptr);
    CUresult (*cuMemAddressReserve)(CUdeviceptr *, size_t, size_t, CUdeviceptr, uint64_t);
    CUresult (*cuMemAddressFree)(CUdeviceptr, size_t);
    CUresult (*cuMemMap)(CUdeviceptr, size_t, size_t, CUhandle, uint64_t);
    CUresult (*cuMemUnmap)(CUdeviceptr, size_t);
    CUresult (*cuMemSetAccess)(CUdeviceptr, size_t, const struct access *, size_t);
    CUresult (*cuMemExportToShareableHandle)(void *, CUhandle, int, uint64_t);
};
extern struct driver driver HIDDEN;

/* -- entry.c: every way into the driver --------------------------------------------------------------------------- */

/* GPUSCHED_DIRECT=0 in the environment switches everything off. */
extern bool direct_is_wanted HIDDEN;

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
/* Outside, until the word is 0 and the gate is open. */
HIDDEN void gate_wait(struct thread *thread, _Atomic uint32_t *word);
/* Makes it 0. */
HIDDEN void gate_wake(_Atomic uint32_t *word);

static inline struct thread *gate_enter(void) {
    struct thread *thread = self;
    if (!LIKELY(thread))
        thread = gate_join();
    if (thread->depth++ == 0 && !thread->exempt) {
        /* A full barrier: either the closer sees us inside, or we see the gate closed. */
        atomic_exchange(&thread->inside, 1);
        if (!LIKELY(atomic_load(&gate_closed) == 0))
            gate_wait(thread, &gate_closed);
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

/* -- index.c: numbers to places in a table ------------------------------------------------------------------------- */

struct index {
    struct slot {
        uint64_t key;
        uint32_t place; /* plus one; 0: never used */
    } *slots;
    size_t room, used; /* used: removed ones included */
};

/* Memory from the kernel: not from malloc, which a program may have replaced by what calls CUDA. NULL: none. */
HIDDEN void *pages(size_t size);
/* For one more. False: there is no memory for it. */
HIDDEN bool index_make_room(struct index *index);
HIDDEN void index_put(struct index *index, uint64_t key, uint32_t place);
HIDDEN bool index_find(const struct index *index, uint64_t key, uint32_t *place);
HIDDEN void index_remove(struct index *index, uint64_t key);
HIDDEN void index_clear(struct index *index);

/* -- memory.c: physical memory, ours and the program's ------------------------------------------------------------- */

/* One physical allocation. It lives as long as anything refers to it: an address of ours, a handle or a mapping of the
 * program's. */
struct memory {
    bool taken;          /* this place in the table */
    bool left;           /* never moved: shared with others, or of a kind that cannot be made again */
    bool foreign;        /* made elsewhere: imported, or by calls that we do not see */
    CUdeviceptr address; /* cuMemAlloc's, which is ours to map; 0: none */
    CUhandle name;       /* what the program calls it by; 0: it has no handle now */
    uint32_t references; /* of the program, by that name */
    uint32_t mappings;   /* of the program's own making, in mappings.c */
    size_t size;
    CUcontext context; /* that cuMemAlloc was called in; NULL: the program made it */
    CUdevice device;
    uint8_t gpu[16]; /* the device's UUID, when this was made */
    struct allocation_properties properties;
    int asked; /* the handle types that the program wanted */
    CUhandle handle; /* the driver's; 0 while the contents are elsewhere */
    bool mapped;     /* at `address` */
    int fd;          /* the exported handle, which keeps the memory alive; -1: none */
};

struct table {
    struct memory *items;
    size_t count, room; /* of items, free ones included */
    size_t foreign;     /* how many are */
};
extern struct table table HIDDEN;

/* Never held by a thread that waits at the gate, since it is taken inside, nor while the driver is called. */
HIDDEN void table_lock(void);
HIDDEN void table_unlock(void);
/* With the lock held. Room for one more; false: there is no memory for it. */
HIDDEN bool table_make_room(void);
HIDDEN uint32_t table_add(const struct memory *memory);
HIDDEN void table_remove(uint32_t place);

HIDDEN CUresult memory_alloc(CUdeviceptr *address, size_t size);
HIDDEN CUresult memory_free(CUdeviceptr address);
/* With the lock held: what memory_alloc made there, or NULL. */
HIDDEN struct memory *memory_at(CUdeviceptr address);
HIDDEN bool memory_is_possible(CUdevice device);
/* A device is to reach what cuMemAlloc has made on others. */
HIDDEN void memory_allow(CUdevice device);
/* A context is destroyed, and what cuMemAlloc made in it with it. */
HIDDEN void memory_end(CUcontext context);
/* The rest is the control thread's, while the gate is closed. */
HIDDEN bool memory_is_movable(const struct memory *memory);
HIDDEN size_t memory_movable_bytes(void);
/* One in which its device can be used; NULL: none is known. */
HIDDEN CUcontext memory_context(const struct memory *memory);
HIDDEN CUresult memory_export(struct memory *memory);
HIDDEN CUresult memory_release(struct memory *memory);
HIDDEN CUresult memory_create(struct memory *memory);
HIDDEN CUresult memory_map(struct memory *memory);
HIDDEN CUresult memory_fill(struct memory *memory, const void *contents);
/* One descriptor for each piece may be more than the program may have: until memory_drop_all it may have more. */
HIDDEN void memory_raise_limit(void);
/* The same as a high number, where that is free: programs may count on small ones. */
HIDDEN int descriptor_move_up(int fd);
HIDDEN void memory_drop_fd(struct memory *memory);
HIDDEN void memory_drop_all(void);
HIDDEN void memory_after_fork(void);

/* -- contexts.c: which contexts there are, and which devices reach which ------------------------------------------- */

/* The current one is one that the program uses. */
HIDDEN void context_note(void);
HIDDEN CUresult context_destroy(CUcontext context);
HIDDEN CUresult peer_enable(CUcontext peer, unsigned flags);
/* Graphs are being captured: to wait for a context now would spoil them. Held, no further one begins. */
HIDDEN bool captures_are_on(void);
HIDDEN void captures_hold(bool held);
/* Before a call that begins a capture, and what it has answered, or one that ends it. */
HIDDEN void capture_wait(void);
HIDDEN CUresult capture_begun(CUresult result);
HIDDEN CUresult capture_ended(CUresult result);
/* One of a device; NULL: none is known. */
HIDDEN CUcontext context_of(CUdevice device);
/* Those that have a context, as bits. */
HIDDEN uint64_t devices_present(void);
HIDDEN bool devices_reach_each_other(void);
/* The control thread's, while the gate is closed. */
HIDDEN CUresult contexts_synchronize(void);
HIDDEN void contexts_after_fork(void);

/* -- handles.c: what the program makes itself, and what it calls it by --------------------------------------------- */

/* With the lock held. NULL: nothing that we know. */
HIDDEN struct memory *handle_find(CUhandle name);
/* With the lock held, after one reference less of whatever kind. The driver's handle, to release it, where that was the
 * last; else 0. */
HIDDEN CUhandle handle_let_go(struct memory *memory);
/* A handle from somewhere that we do not see is in use: a multicast object, as far as we know. */
HIDDEN void handle_note_foreign(CUhandle name);
HIDDEN CUresult handle_create(CUhandle *handle, size_t size, const struct allocation_properties *wanted,
                              uint64_t flags);
HIDDEN CUresult handle_release(CUhandle name);
HIDDEN CUresult handle_retain(CUhandle *handle, void *address);
HIDDEN CUresult handle_export(void *shareable, CUhandle name, int type, uint64_t flags);
HIDDEN CUresult handle_import(CUhandle *handle, void *shareable, int type);
HIDDEN CUresult handle_properties(struct allocation_properties *properties, CUhandle name);
HIDDEN CUresult handle_for_range(void *handle, CUdeviceptr address, size_t size, int type, uint64_t flags);
HIDDEN void handles_after_fork(void);

/* -- mappings.c: where the program maps it ------------------------------------------------------------------------- */

HIDDEN CUresult mapping_make(CUdeviceptr address, size_t size, size_t offset, CUhandle name, uint64_t flags);
HIDDEN CUresult mapping_end(CUdeviceptr address, size_t size);
HIDDEN CUresult mapping_set_access(CUdeviceptr address, size_t size, const struct access *access, size_t count);
/* With the lock held: what is mapped there, or NULL; and what is mapped there is not to move from now on. */
HIDDEN struct memory *mapping_at(CUdeviceptr address);
HIDDEN void mappings_leave(CUdeviceptr address, size_t size);
/* The control thread's, while the gate is closed: all mappings of what moves. */
HIDDEN CUresult mappings_away(void);
HIDDEN CUresult mappings_back(void);
HIDDEN void mappings_after_fork(void);

/* -- sharing.c: CUDA IPC, and what is of others ------------------------------------------------------------------ */

HIDDEN CUresult ipc_get(void *handle, CUdeviceptr address);
HIDDEN CUresult ipc_open(CUdeviceptr *address, struct ipc_handle handle, unsigned flags);
HIDDEN CUresult ipc_close(CUdeviceptr address);
/* With the lock held: how much is foreign has changed. */
HIDDEN void sharing_note(void);
HIDDEN void sharing_after_fork(void);

/* -- control.c: the thread that does what the daemon asks --------------------------------------------------------- */

/* After the first cuInit that succeeded. */
HIDDEN void control_start(void);
HIDDEN void control_after_fork(void);
/* So many pieces of other processes' memory are in use here. */
HIDDEN void control_note_imports(size_t count);

#endif
