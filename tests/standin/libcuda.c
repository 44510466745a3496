/* A stand-in for the CUDA driver, for tests on machines without a GPU: device memory is host memory.
 *
 * Real in it: who holds memory and for how long (memory files), addresses that stay while memory goes, calls that block
 * while a process is locked from outside, "kernels" that run on a thread of their own. Not real: everything else. What
 * other processes may know lies in STANDIN_DIR, one file for each process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
typedef int CUresult;
typedef unsigned long long Ptr;
enum { OK = 0, INVALID = 1, INVALID_CONTEXT = 201, OOM = 2, NOT_INITIALIZED = 3, NOT_READY = 600, NOT_FOUND = 500, NOT_SUPPORTED = 801 };
enum { RUNNING = 0, LOCKED = 1, CHECKPOINTED = 2 };

/* -- what other processes see -------------------------------------------------------------------------------------- */

struct shared {
    _Atomic int state;   /* as cuCheckpointProcessGetState says */
    _Atomic int inside;  /* calls that have begun and not ended */
};
static struct shared *mine;

static struct shared *shared_of(int pid, bool make) {
    char path[256];
    const char *directory = getenv("STANDIN_DIR");
    snprintf(path, sizeof path, "%s/%d", directory ? directory : "/tmp", pid);
    int fd = open(path, O_RDWR | O_CLOEXEC | (make ? O_CREAT : 0), 0600);
    if (fd < 0)
        return NULL;
    if (make && ftruncate(fd, sizeof *mine) != 0)
        abort();
    void *found = mmap(NULL, sizeof *mine, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return found == MAP_FAILED ? NULL : found;
}

static void enter(void) {
    for (;;) {
        atomic_fetch_add(&mine->inside, 1);
        if (atomic_load(&mine->state) == RUNNING)
            return;
        atomic_fetch_sub(&mine->inside, 1);
        usleep(200);
    }
}

static CUresult leave(CUresult result) {
    atomic_fetch_sub(&mine->inside, 1);
    return result;
}
#define CALL(body) (enter(), leave(body))

/* -- device, context ----------------------------------------------------------------------------------------------- */

static __thread void *current;

API CUresult cuInit(unsigned flags) {
    (void)flags;
    if (mine == NULL)
        mine = shared_of(getpid(), true);
    return mine == NULL ? NOT_INITIALIZED : OK;
}
API CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
static int devices(void) { return getenv("STANDIN_DEVICES") ? atoi(getenv("STANDIN_DEVICES")) : 1; }
API CUresult cuDeviceGet(int *device, int n) { *device = n; return n >= 0 && n < devices() ? OK : INVALID; }
API CUresult cuDeviceGetCount(int *number) { *number = devices(); return OK; }
API CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 102 || attribute == 103;
    return OK;
}
API CUresult cuDeviceGetUuid(void *uuid, int device) {
    memset(uuid, 0x5a + device, 16);
    return OK;
}
API CUresult cuDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer && getenv("STANDIN_NO_PEERS") == NULL;
    return OK;
}
static _Atomic bool destroyed[5];
/* A context is a number: of its device, plus two where it is not the primary one; and one, so as not to be null. */
API CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)(intptr_t)(device + 1);
    return CALL(OK);
}
API CUresult cuCtxCreate_v2(void **context, unsigned flags, int device) {
    (void)flags;
    *context = current = (void *)(intptr_t)(device + 3);
    destroyed[device + 3] = false;
    return CALL(OK);
}
API CUresult cuCtxDestroy_v2(void *context) { destroyed[(intptr_t)context] = true; return CALL(OK); }
API CUresult cuCtxSetCurrent(void *context) {
    current = context;
    return CALL(destroyed[(intptr_t)context] ? INVALID_CONTEXT : OK);
}
API CUresult cuCtxGetCurrent(void **context) { *context = current; return CALL(OK); }
static int current_device(void) { return ((int)(intptr_t)current - 1) % 2; }
API CUresult cuCtxGetDevice(int *device) { *device = current_device(); return CALL(current ? OK : INVALID); }
API CUresult cuCtxEnablePeerAccess(void *peer, unsigned flags) { (void)peer, (void)flags; return CALL(OK); }

/* -- memory -------------------------------------------------------------------------------------------------------- */

/* Of a GPU that each process has to itself; the file "vram" changes it. */
static size_t capacity(void) {
    char path[256], text[32] = {0};
    snprintf(path, sizeof path, "%s/vram", getenv("STANDIN_DIR") ? getenv("STANDIN_DIR") : "/tmp");
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return (size_t)1 << 30;
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    return size > 0 ? strtoull(text, NULL, 10) : 0;
}
static _Atomic size_t used; /* of this process alone */

API CUresult cuMemGetInfo_v2(size_t *free_, size_t *total) {
    *total = capacity();
    *free_ = *total - used;
    return CALL(OK);
}

struct header { size_t size; char pad[4096 - sizeof(size_t)]; };
static CUresult do_alloc(Ptr *address, size_t size) {
    if (used + size > capacity())
        return OOM;
    struct header *made = mmap(NULL, size + sizeof *made, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED)
        return OOM;
    made->size = size;
    used += size;
    *address = (Ptr)(made + 1);
    return OK;
}
API CUresult cuMemAlloc_v2(Ptr *address, size_t size) { return CALL(do_alloc(address, size)); }
static CUresult do_free(Ptr address) {
    struct header *made = (struct header *)address - 1;
    used -= made->size;
    munmap(made, made->size + sizeof *made);
    return OK;
}
API CUresult cuMemFree_v2(Ptr address) { return CALL(do_free(address)); }

/* Of physical memory, the handle is the number of its memory file, plus one: numbers that soon come again. It lives as
 * long as a handle or a mapping of it. */
enum { LARGE_PAGE = 2 << 20, MOST_FILES = 1 << 16, POSIX = 1, DEVICES = 2 };
struct location { int type, id; };
struct properties {
    int type, handle_types;
    struct location location;
    void *metadata;
    unsigned char compression, rdma;
    unsigned short usage;
    unsigned char reserved[4];
};
static struct physical {
    size_t size;
    int references, mappings;
    bool imported;
    struct properties properties;
} physical[MOST_FILES];
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
#define MEMORY_CALL(body) (enter(), leave((pthread_mutex_lock(&memory_lock), unlocked(body))))
static CUresult unlocked(CUresult result) {
    pthread_mutex_unlock(&memory_lock);
    return result;
}

static struct physical *physical_of(unsigned long long handle) {
    return handle > 0 && handle <= MOST_FILES && physical[handle - 1].references > 0 ? &physical[handle - 1] : NULL;
}
static void let_go(struct physical *memory) {
    if (memory->references > 0 || memory->mappings > 0)
        return;
    used -= memory->size;
    close((int)(memory - physical));
}

static CUresult do_create(unsigned long long *handle, size_t size, const struct properties *p) {
    const bool on_device = p->location.type == 1 && p->location.id >= 0 && p->location.id < DEVICES;
    if (size == 0 || size % LARGE_PAGE || p->type != 1 || (!on_device && (p->location.type != 2 || p->handle_types)))
        return INVALID;
    if (p->handle_types & ~POSIX)
        return NOT_SUPPORTED;
    if (used + size > capacity())
        return OOM;
    int fd = memfd_create("standin-vram", MFD_CLOEXEC);
    if (fd < 0 || fd >= MOST_FILES || ftruncate(fd, (off_t)size) != 0)
        return OOM;
    used += size;
    physical[fd] = (struct physical){.size = size, .references = 1, .properties = *p};
    *handle = (unsigned long long)fd + 1;
    return OK;
}
API CUresult cuMemCreate(unsigned long long *handle, size_t size, const struct properties *p,
                         unsigned long long flags) {
    (void)flags;
    return MEMORY_CALL(do_create(handle, size, p));
}
static CUresult do_release(unsigned long long handle) {
    struct physical *memory = physical_of(handle);
    if (memory == NULL)
        return INVALID;
    memory->references--;
    let_go(memory);
    return OK;
}
API CUresult cuMemRelease(unsigned long long handle) { return MEMORY_CALL(do_release(handle)); }
static CUresult do_properties(struct properties *p, unsigned long long handle) {
    const struct physical *memory = physical_of(handle);
    if (memory != NULL)
        *p = memory->properties;
    return memory != NULL ? OK : INVALID;
}
API CUresult cuMemGetAllocationPropertiesFromHandle(struct properties *p, unsigned long long handle) {
    return MEMORY_CALL(do_properties(p, handle));
}
static CUresult do_export(int *fd, unsigned long long handle, int type) {
    const struct physical *memory = physical_of(handle);
    if (memory == NULL || memory->imported || type != POSIX || !(memory->properties.handle_types & POSIX))
        return INVALID;
    *fd = fcntl((int)handle - 1, F_DUPFD_CLOEXEC, 0);
    return *fd < 0 ? OOM : OK;
}
API CUresult cuMemExportToShareableHandle(void *fd, unsigned long long handle, int type, unsigned long long flags) {
    (void)flags;
    return MEMORY_CALL(do_export(fd, handle, type));
}
static CUresult do_import(unsigned long long *handle, int fd) {
    char link[64], name[64] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, name, sizeof name - 1) < 0 || strncmp(name, "/memfd:standin-vram", 19) != 0)
        return INVALID; /* as the driver: no memory of its own */
    struct stat about;
    fstat(fd, &about);
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0 || own >= MOST_FILES)
        return OOM;
    used += (size_t)about.st_size;
    physical[own] = (struct physical){.size = (size_t)about.st_size, .references = 1, .imported = true};
    *handle = (unsigned long long)own + 1;
    return OK;
}
API CUresult cuMemImportFromShareableHandle(unsigned long long *handle, void *fd, int type) {
    (void)type;
    return MEMORY_CALL(do_import(handle, (int)(intptr_t)fd));
}

/* -- virtual memory: reservations, and mappings in them ------------------------------------------------------------ */

static struct range { Ptr address; size_t size; } reserved[MOST_FILES];
static struct mapping {
    Ptr address;
    size_t size;
    struct physical *memory;
    int access[DEVICES];
} mapped[MOST_FILES];
static size_t reservations, mappings;

static CUresult do_reserve(Ptr *address, size_t size) {
    const size_t align = LARGE_PAGE;
    char *found = mmap(NULL, size + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED || reservations == MOST_FILES)
        return OOM;
    char *begin = (char *)(((uintptr_t)found + align - 1) & ~(align - 1));
    if (begin > found)
        munmap(found, (size_t)(begin - found));
    if (found + align > begin)
        munmap(begin + size, (size_t)(found + align - begin));
    *address = (Ptr)begin;
    reserved[reservations++] = (struct range){*address, size};
    return OK;
}
API CUresult cuMemAddressReserve(Ptr *address, size_t size, size_t align, Ptr wish, unsigned long long flags) {
    (void)align, (void)wish, (void)flags;
    return MEMORY_CALL(do_reserve(address, size));
}
/* The reservation that all of a range is in. */
static struct range *reservation_of(Ptr address, size_t size) {
    for (size_t i = 0; i < reservations; i++)
        if (reserved[i].address <= address && address + size <= reserved[i].address + reserved[i].size)
            return &reserved[i];
    return NULL;
}
static bool overlaps(const struct mapping *mapping, Ptr address, size_t size) {
    return mapping->address < address + size && address < mapping->address + mapping->size;
}
/* How much of a range is mapped, by mappings that lie in it as a whole; a part of one counts for more than there is. */
static size_t whole_bytes(Ptr address, size_t size) {
    size_t bytes = 0;
    for (size_t i = 0; i < mappings; i++)
        if (overlaps(&mapped[i], address, size)) {
            bool whole = mapped[i].address >= address && mapped[i].address + mapped[i].size <= address + size;
            bytes += whole ? mapped[i].size : size + 1;
        }
    return bytes;
}
static CUresult do_address_free(Ptr address, size_t size) {
    struct range *range = reservation_of(address, size);
    if (range == NULL || range->address != address || range->size != size || whole_bytes(address, size) != 0)
        return INVALID;
    *range = reserved[--reservations];
    return munmap((void *)address, size) ? INVALID : OK;
}
API CUresult cuMemAddressFree(Ptr address, size_t size) { return MEMORY_CALL(do_address_free(address, size)); }
static CUresult do_map(Ptr address, size_t size, size_t offset, unsigned long long handle) {
    struct physical *memory = physical_of(handle);
    if (memory == NULL || size == 0 || size % LARGE_PAGE || offset % LARGE_PAGE || offset + size > memory->size ||
        reservation_of(address, size) == NULL || whole_bytes(address, size) != 0 || mappings == MOST_FILES)
        return INVALID;
    if (mmap((void *)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)handle - 1, (off_t)offset) == MAP_FAILED)
        return INVALID;
    memory->mappings++;
    mapped[mappings++] = (struct mapping){.address = address, .size = size, .memory = memory};
    return OK;
}
API CUresult cuMemMap(Ptr address, size_t size, size_t offset, unsigned long long handle, unsigned long long flags) {
    (void)flags;
    return MEMORY_CALL(do_map(address, size, offset, handle));
}
static CUresult do_unmap(Ptr address, size_t size) {
    if (whole_bytes(address, size) != size)
        return INVALID;
    for (size_t i = mappings; i-- > 0;)
        if (overlaps(&mapped[i], address, size)) {
            struct physical *memory = mapped[i].memory;
            mapped[i] = mapped[--mappings];
            memory->mappings--;
            let_go(memory);
        }
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    return mmap((void *)address, size, PROT_NONE, flags, -1, 0) == MAP_FAILED ? INVALID : OK;
}
API CUresult cuMemUnmap(Ptr address, size_t size) { return MEMORY_CALL(do_unmap(address, size)); }
struct access { struct location location; int flags; };
static CUresult do_access(Ptr address, size_t size, const struct access *access, size_t count) {
    if (whole_bytes(address, size) != size || reservation_of(address, size) == NULL)
        return INVALID;
    for (size_t k = 0; k < count; k++) {
        const struct access *wish = &access[k];
        if (wish->location.type != 1 || wish->location.id < 0 || wish->location.id >= DEVICES)
            return INVALID;
        for (size_t i = 0; i < mappings; i++)
            if (overlaps(&mapped[i], address, size))
                mapped[i].access[wish->location.id] = wish->flags;
    }
    for (size_t i = 0; i < mappings; i++)
        if (overlaps(&mapped[i], address, size)) {
            const int flags = mapped[i].access[0] | mapped[i].access[1]; /* the host is in place of any device */
            mprotect((void *)mapped[i].address, mapped[i].size,
                     (flags & 1 ? PROT_READ : 0) | (flags & 2 ? PROT_WRITE : 0));
        }
    return OK;
}
API CUresult cuMemSetAccess(Ptr address, size_t size, const struct access *access, size_t count) {
    return MEMORY_CALL(do_access(address, size, access, count));
}
static const struct mapping *mapping_at(Ptr address) {
    for (size_t i = 0; i < mappings; i++)
        if (overlaps(&mapped[i], address, 1))
            return &mapped[i];
    return NULL;
}
static CUresult do_get_access(unsigned long long *flags, const struct location *location, Ptr address) {
    const struct mapping *found = mapping_at(address);
    if (found != NULL)
        *flags = (unsigned long long)found->access[location->id];
    return found != NULL ? OK : INVALID;
}
API CUresult cuMemGetAccess(unsigned long long *flags, const struct location *location, Ptr address) {
    return MEMORY_CALL(do_get_access(flags, location, address));
}
static CUresult do_retain(unsigned long long *handle, Ptr address) {
    const struct mapping *found = mapping_at(address);
    if (found == NULL)
        return INVALID;
    found->memory->references++;
    *handle = (unsigned long long)(found->memory - physical) + 1;
    return OK;
}
API CUresult cuMemRetainAllocationHandle(unsigned long long *handle, void *address) {
    return MEMORY_CALL(do_retain(handle, (Ptr)address));
}
API CUresult cuMemGetHandleForAddressRange(void *fd, Ptr address, size_t size, int type, unsigned long long flags) {
    (void)address, (void)size, (void)type, (void)flags;
    *(int *)fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    return CALL(OK);
}
/* Of memory of its own making alone, as the driver. A handle is the address, again and again, to the last byte. */
struct ipc_handle { Ptr words[8]; };
static CUresult do_ipc_get(struct ipc_handle *handle, Ptr address) {
    for (size_t i = 0; i < 8; i++)
        handle->words[i] = address;
    return mapping_at(address) == NULL ? OK : INVALID;
}
API CUresult cuIpcGetMemHandle(struct ipc_handle *handle, Ptr address) {
    return MEMORY_CALL(do_ipc_get(handle, address));
}
static CUresult do_ipc_open(Ptr *address, const struct ipc_handle *handle, unsigned flags) {
    *address = handle->words[0];
    for (size_t i = 0; i < 8; i++)
        if (handle->words[i] != *address || flags != 1)
            return INVALID;
    return OK;
}
API CUresult cuIpcOpenMemHandle_v2(Ptr *address, struct ipc_handle handle, unsigned flags) {
    return CALL(do_ipc_open(address, &handle, flags));
}
API CUresult cuIpcOpenEventHandle(void **event, struct ipc_handle handle) {
    return CALL(do_ipc_open((Ptr *)event, &handle, 1));
}
API CUresult cuIpcCloseMemHandle(Ptr address) { (void)address; return CALL(OK); }

API CUresult cuMemHostRegister_v2(void *address, size_t size, unsigned flags) {
    (void)address, (void)size, (void)flags;
    return CALL(OK);
}
API CUresult cuMemHostUnregister(void *address) { (void)address; return CALL(OK); }

/* -- streams: one queue, one thread; copies are done at once ------------------------------------------------------- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct work { uint64_t *words; size_t count; } queue[1024];
static size_t begun, done;
static bool runs;

static void *run(void *unused) __attribute__((noreturn));
static void *run(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (done == begun)
            pthread_cond_wait(&changed, &lock);
        struct work work = queue[done % 1024];
        pthread_mutex_unlock(&lock);
        for (size_t i = 0; i < work.count; i++)
            work.words[i]++;
        pthread_mutex_lock(&lock);
        done++;
        pthread_cond_broadcast(&changed);
    }
}
/* The only "kernel": adds one to each of the words. Parameters: address, count. */
static CUresult do_launch(void **parameters) {
    pthread_mutex_lock(&lock);
    if (!runs) {
        pthread_t thread;
        pthread_create(&thread, NULL, run, NULL);
        runs = true;
    }
    while (begun - done == 1024)
        pthread_cond_wait(&changed, &lock);
    queue[begun++ % 1024] = (struct work){*(uint64_t **)parameters[0], *(size_t *)parameters[1]};
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return OK;
}
API CUresult cuModuleLoadData(void **module, const void *image) { (void)image; *module = (void *)1; return CALL(OK); }
API CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module, (void)name;
    *function = (void *)1;
    return CALL(OK);
}
API CUresult cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                            unsigned shared, void *stream, void **parameters, void **extra) {
    (void)f, (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)stream, (void)extra;
    return CALL(do_launch(parameters));
}
static CUresult do_synchronize(void) {
    pthread_mutex_lock(&lock);
    size_t until = begun;
    while (done < until)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    return OK;
}
/* A capture is spoiled by whoever waits for the context meanwhile. */
enum { NOT_WHILE_CAPTURING = 900, SPOILED = 901 };
static _Atomic int captures, spoiled;
static CUresult do_begin_capture(void) { captures++; return OK; }
static CUresult do_end_capture(void) { captures--; return atomic_exchange(&spoiled, 0) ? SPOILED : OK; }
API CUresult cuStreamBeginCapture_v2(void *stream, int mode) {
    (void)stream, (void)mode;
    return CALL(do_begin_capture());
}
API CUresult cuStreamBeginCapture_v2_ptsz(void *stream, int mode) { return cuStreamBeginCapture_v2(stream, mode); }
API CUresult cuStreamBeginCaptureToGraph(void *stream, void *graph, const void *on, const void *data, size_t count,
                                         int mode) {
    (void)graph, (void)on, (void)data, (void)count;
    return cuStreamBeginCapture_v2(stream, mode);
}
API CUresult cuStreamBeginCaptureToGraph_ptsz(void *stream, void *graph, const void *on, const void *data,
                                              size_t count, int mode) {
    return cuStreamBeginCaptureToGraph(stream, graph, on, data, count, mode);
}
API CUresult cuStreamEndCapture(void *stream, void *graph) { (void)stream, (void)graph; return CALL(do_end_capture()); }
API CUresult cuStreamEndCapture_ptsz(void *stream, void *graph) { return cuStreamEndCapture(stream, graph); }
static CUresult do_synchronize_all(void) {
    if (captures == 0)
        return do_synchronize();
    spoiled = 1;
    return NOT_WHILE_CAPTURING;
}
API CUresult cuCtxSynchronize(void) { return CALL(do_synchronize_all()); }
API CUresult cuStreamSynchronize(void *stream) { (void)stream; return CALL(do_synchronize()); }
API CUresult cuStreamCreate(void **stream, unsigned flags) { (void)flags; *stream = (void *)1; return CALL(OK); }
/* A call that does not come back for so many microseconds. */
API CUresult cuStandinSleep(unsigned us) { return CALL((usleep(us), OK)); }
static CUresult do_copy(void *to, const void *from, size_t size) { do_synchronize(); memcpy(to, from, size); return OK; }
API CUresult cuMemcpyDtoHAsync_v2(void *to, Ptr from, size_t size, void *stream) {
    (void)stream;
    return CALL(do_copy(to, (void *)from, size));
}
API CUresult cuMemcpyHtoDAsync_v2(Ptr to, const void *from, size_t size, void *stream) {
    (void)stream;
    return CALL(do_copy((void *)to, from, size));
}
API CUresult cuMemcpyHtoD_v2(Ptr to, const void *from, size_t size) { return CALL(do_copy((void *)to, from, size)); }
static bool is_reached(Ptr address) {
    const struct mapping *found = mapping_at(address);
    return found == NULL || found->access[current_device()] == 3;
}
static CUresult do_copy_within(Ptr to, Ptr from, size_t size) {
    return is_reached(to) && is_reached(from) ? do_copy((void *)to, (void *)from, size) : INVALID;
}
API CUresult cuMemcpyDtoDAsync_v2(Ptr to, Ptr from, size_t size, void *stream) {
    (void)stream;
    return MEMORY_CALL(do_copy_within(to, from, size));
}
API CUresult cuMemsetD8_v2(Ptr to, unsigned char value, size_t size) {
    return CALL((do_synchronize(), memset((void *)to, value, size), OK));
}

/* -- checkpoints of other processes -------------------------------------------------------------------------------- */

static CUresult change(int pid, int from, int to) {
    struct shared *other = shared_of(pid, false);
    if (other == NULL)
        return NOT_INITIALIZED;
    int expected = from;
    CUresult result = atomic_compare_exchange_strong(&other->state, &expected, to) ? OK : INVALID;
    munmap(other, sizeof *other);
    return result;
}
API CUresult cuCheckpointProcessLock(int pid, void *arguments) {
    unsigned wait_ms = arguments ? *(unsigned *)arguments : 0;
    struct shared *other = shared_of(pid, false);
    CUresult result = change(pid, RUNNING, LOCKED);
    for (unsigned waited = 0; result == OK && atomic_load(&other->inside) > 0; waited++) {
        if (wait_ms && waited >= wait_ms) {
            change(pid, LOCKED, RUNNING);
            result = NOT_READY;
        }
        usleep(1000);
    }
    return result;
}
API CUresult cuCheckpointProcessCheckpoint(int pid, void *a) { (void)a; return change(pid, LOCKED, CHECKPOINTED); }
API CUresult cuCheckpointProcessRestore(int pid, void *a) { (void)a; return change(pid, CHECKPOINTED, LOCKED); }
API CUresult cuCheckpointProcessUnlock(int pid, void *a) { (void)a; return change(pid, LOCKED, RUNNING); }
API CUresult cuCheckpointProcessGetState(int pid, int *state) {
    struct shared *other = shared_of(pid, false);
    if (other == NULL)
        return NOT_INITIALIZED;
    *state = atomic_load(&other->state);
    munmap(other, sizeof *other);
    return OK;
}

/* -- looking up ---------------------------------------------------------------------------------------------------- */

API CUresult cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, void *status) {
    static const char *const renamed[] = {"cuMemAlloc", "cuMemFree", "cuMemGetInfo", "cuMemHostRegister",
        "cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync", "cuMemcpyDtoDAsync", "cuMemsetD8", "cuIpcOpenMemHandle",
        "cuCtxDestroy", "cuStreamBeginCapture", "cuGetProcAddress"};
    static void *self;
    char symbol[128];
    (void)version, (void)flags, (void)status;
    if (self == NULL) {
        Dl_info about;
        dladdr((void *)cuInit, &about);
        self = dlopen(about.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    }
    bool second = false;
    for (size_t i = 0; i < sizeof renamed / sizeof *renamed; i++)
        second = second || strcmp(name, renamed[i]) == 0;
    snprintf(symbol, sizeof symbol, "%s%s", name, second ? "_v2" : "");
    void *address = dlsym(self, symbol);
    *found = address;
    return address ? OK : NOT_FOUND;
}
API CUresult cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, found, version, flags, NULL);
}
API CUresult cuGetExportTable(const void **table, const void *id) { (void)table, (void)id; return NOT_FOUND; }
API CUresult cuGetErrorString(CUresult error, const char **text) { (void)error; *text = "stand-in"; return OK; }
API CUresult cuGetErrorName(CUresult error, const char **text) { (void)error; *text = "stand-in"; return OK; }
