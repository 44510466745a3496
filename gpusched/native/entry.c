/* Every way into the driver: dlsym, cuGetProcAddress, and linking to it.
 *
 * Whoever looks up a function of libcuda gets one of many alike wrappers, which counts the thread in, calls the
 * function and counts it out. The functions that make, map and free device memory are answered by memory.c, handles.c
 * and mappings.c instead.
 */
#define _GNU_SOURCE
#include "direct.h"
#include "names.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct driver driver = {0};
#define FOURTEEN long, long, long, long, long, long, long, long, long, long, long, long, long, long
typedef long (*function)(FOURTEEN);

/* -- the wrappers -------------------------------------------------------------------------------------------------- */

enum { SLOTS = 1024 };
static function real[SLOTS];

/* Compiled without floating point registers, so that a float among the arguments of a function stays where it is. */
/* No function of the driver has more than 12 arguments, and none more than 64 bytes of them on the stack, as those have
 * that are given an IPC handle by value. What is passed beyond a function's own does no harm. */
#define GIVEN                                                                                                          \
    long a, long b, long c, long d, long e, long f, long g, long h, long i, long j, long k, long l, long m, long n
#define AS_GIVEN a, b, c, d, e, f, g, h, i, j, k, l, m, n
#define WRAPPER(number)                                                                                                \
    static long wrapper_##number(GIVEN) {                                                                              \
        struct thread *thread = gate_enter();                                                                          \
        long result = real[0x##number](AS_GIVEN);                                                                      \
        gate_leave(thread);                                                                                            \
        return result;                                                                                                 \
    }
#define SIXTEEN(M, n)                                                                                                  \
    M(n##0) M(n##1) M(n##2) M(n##3) M(n##4) M(n##5) M(n##6) M(n##7) M(n##8) M(n##9) M(n##a) M(n##b) M(n##c) M(n##d)    \
        M(n##e) M(n##f)
#define TIMES_256(M, n)                                                                                                \
    SIXTEEN(M, n##0) SIXTEEN(M, n##1) SIXTEEN(M, n##2) SIXTEEN(M, n##3) SIXTEEN(M, n##4) SIXTEEN(M, n##5)              \
    SIXTEEN(M, n##6) SIXTEEN(M, n##7) SIXTEEN(M, n##8) SIXTEEN(M, n##9) SIXTEEN(M, n##a) SIXTEEN(M, n##b)              \
    SIXTEEN(M, n##c) SIXTEEN(M, n##d) SIXTEEN(M, n##e) SIXTEEN(M, n##f)
#define ALL(M) TIMES_256(M, 0) TIMES_256(M, 1) TIMES_256(M, 2) TIMES_256(M, 3)

ALL(WRAPPER)
#define NAME(n) wrapper_##n,
static const function wrappers[SLOTS] = {ALL(NAME)};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used;

/* The one wrapper of a function; itself where there are no more. */
static void *wrap(void *function_) {
    pthread_mutex_lock(&lock);
    size_t slot = 0;
    while (slot < used && (void *)real[slot] != function_)
        slot++;
    if (slot == used && used < SLOTS)
        real[used++] = (function)function_;
    pthread_mutex_unlock(&lock);
    return slot < SLOTS ? (void *)wrappers[slot] : function_;
}

/* -- what is not merely passed on ---------------------------------------------------------------------------------- */

static CUresult init(unsigned flags) {
    CUresult result = driver.cuInit(flags);
    if (result == CUDA_SUCCESS)
        control_start();
    return result;
}

static CUresult alloc(CUdeviceptr *address, size_t size) {
    struct thread *thread = gate_enter();
    /* Within another call it is the driver that allocates, for itself. */
    CUresult result = thread->depth > 1 ? driver.cuMemAlloc(address, size) : memory_alloc(address, size);
    gate_leave(thread);
    return result;
}

static CUresult free_(CUdeviceptr address) {
    struct thread *thread = gate_enter();
    CUresult result = memory_free(address);
    gate_leave(thread);
    return result;
}

/* Those that name physical memory, or map it. Within another call it is the driver that does so, for itself. */
#define ANSWERED(call, ours, parameters, arguments)                                                                    \
    static CUresult answer_##call parameters {                                                                         \
        struct thread *thread = gate_enter();                                                                          \
        CUresult result = thread->depth > 1 ? driver.call arguments : ours arguments;                                  \
        gate_leave(thread);                                                                                            \
        return result;                                                                                                 \
    }
ANSWERED(cuMemCreate, handle_create, (CUhandle * a, size_t b, const struct allocation_properties *c, uint64_t d),
         (a, b, c, d))
ANSWERED(cuMemRelease, handle_release, (CUhandle a), (a))
ANSWERED(cuMemMap, mapping_make, (CUdeviceptr a, size_t b, size_t c, CUhandle d, uint64_t e), (a, b, c, d, e))
ANSWERED(cuMemUnmap, mapping_end, (CUdeviceptr a, size_t b), (a, b))
ANSWERED(cuMemSetAccess, mapping_set_access, (CUdeviceptr a, size_t b, const struct access *c, size_t d), (a, b, c, d))
ANSWERED(cuMemRetainAllocationHandle, handle_retain, (CUhandle * a, void *b), (a, b))
ANSWERED(cuMemExportToShareableHandle, handle_export, (void *a, CUhandle b, int c, uint64_t d), (a, b, c, d))
ANSWERED(cuMemImportFromShareableHandle, handle_import, (CUhandle * a, void *b, int c), (a, b, c))
ANSWERED(cuMemGetAllocationPropertiesFromHandle, handle_properties, (struct allocation_properties * a, CUhandle b),
         (a, b))
ANSWERED(cuMemGetHandleForAddressRange, handle_for_range, (void *a, CUdeviceptr b, size_t c, int d, uint64_t e),
         (a, b, c, d, e))

ANSWERED(cuCtxEnablePeerAccess, peer_enable, (CUcontext a, unsigned b), (a, b))
ANSWERED(cuCtxDestroy, context_destroy, (CUcontext a), (a))
ANSWERED(cuIpcGetMemHandle, ipc_get, (void *a, CUdeviceptr b), (a, b))
ANSWERED(cuIpcOpenMemHandle, ipc_open, (CUdeviceptr * a, struct ipc_handle b, unsigned c), (a, b, c))
ANSWERED(cuIpcCloseMemHandle, ipc_close, (CUdeviceptr a), (a))


#define BEGINS(call, parameters, arguments)                                                                            \
    static CUresult begin_##call parameters {                                                                          \
        capture_wait();                                                                                                \
        return capture_begun(driver.call arguments);                                                                   \
    }                                                                                                                  \
    ANSWERED(call, begin_##call, parameters, arguments)
BEGINS(cuStreamBeginCapture_v2, (void *a, int b), (a, b))
BEGINS(cuStreamBeginCapture_v2_ptsz, (void *a, int b), (a, b))
BEGINS(cuStreamBeginCaptureToGraph, (void *a, void *b, const void *c, const void *d, size_t e, int f),
       (a, b, c, d, e, f))
BEGINS(cuStreamBeginCaptureToGraph_ptsz, (void *a, void *b, const void *c, const void *d, size_t e, int f),
       (a, b, c, d, e, f))
#define ENDS(call)                                                                                                     \
    static CUresult end_##call(void *a, void *b) { return capture_ended(driver.call(a, b)); }                          \
    ANSWERED(call, end_##call, (void *a, void *b), (a, b))
ENDS(cuStreamEndCapture)
ENDS(cuStreamEndCapture_ptsz)

static void *replace(const char *name, void *found);

static CUresult get_proc_address(const char *name, void **found, int version, uint64_t flags, void *status) {
    if (self != NULL && self->depth > 0) /* the driver asks for itself */
        return driver.cuGetProcAddress(name, found, version, flags, status);
    CUresult result = driver.cuGetProcAddress(name, found, version, flags, status);
    if (result == CUDA_SUCCESS && found != NULL && *found != NULL && name != NULL)
        *found = replace(name, *found);
    return result;
}

/* The older form has no status, which is the last argument. */
static CUresult get_proc_address_v1(const char *name, void **found, int version, uint64_t flags) {
    return get_proc_address(name, found, version, flags, NULL);
}

#define AS_ASKED(call, version) {#call, #call, version, 0, (void *)answer_##call}
enum { OF_THREAD = 2 }; /* cuGetProcAddress is to answer for a default stream for each thread */
static const struct {
    const char *name;  /* as dlsym knows it */
    const char *asked; /* and cuGetProcAddress, with the version */
    int version;
    uint64_t flags;
    void *ours;
} replaced[] = {
    {"cuInit", "cuInit", 2000, 0, (void *)init},
    {"cuMemAlloc_v2", "cuMemAlloc", 3020, 0, (void *)alloc},
    {"cuMemFree_v2", "cuMemFree", 3020, 0, (void *)free_},
    {"cuGetProcAddress_v2", "cuGetProcAddress", 12000, 0, (void *)get_proc_address},
    {"cuGetProcAddress", "cuGetProcAddress", 11030, 0, (void *)get_proc_address_v1},
    AS_ASKED(cuMemCreate, 10020),
    AS_ASKED(cuMemRelease, 10020),
    AS_ASKED(cuMemMap, 10020),
    AS_ASKED(cuMemUnmap, 10020),
    AS_ASKED(cuMemSetAccess, 10020),
    AS_ASKED(cuMemRetainAllocationHandle, 11000),
    AS_ASKED(cuMemExportToShareableHandle, 10020),
    AS_ASKED(cuMemImportFromShareableHandle, 10020),
    AS_ASKED(cuMemGetAllocationPropertiesFromHandle, 10020),
    AS_ASKED(cuMemGetHandleForAddressRange, 11070),
    AS_ASKED(cuCtxEnablePeerAccess, 4000),
    {"cuCtxDestroy_v2", "cuCtxDestroy", 4000, 0, (void *)answer_cuCtxDestroy},
    AS_ASKED(cuIpcGetMemHandle, 4010),
    {"cuIpcOpenMemHandle_v2", "cuIpcOpenMemHandle", 11000, 0, (void *)answer_cuIpcOpenMemHandle},
    AS_ASKED(cuIpcCloseMemHandle, 4010),
#define CAPTURES(call, suffix, version, flags) {#call #suffix, #call, version, flags, (void *)answer_##call##suffix}
    CAPTURES(cuStreamBeginCapture, _v2, 10010, 0),
    CAPTURES(cuStreamBeginCapture, _v2_ptsz, 10010, OF_THREAD),
    CAPTURES(cuStreamBeginCaptureToGraph, , 12030, 0),
    CAPTURES(cuStreamBeginCaptureToGraph, _ptsz, 12030, OF_THREAD),
    CAPTURES(cuStreamEndCapture, , 10000, 0),
    CAPTURES(cuStreamEndCapture, _ptsz, 10000, OF_THREAD),
};
enum { REPLACED = sizeof replaced / sizeof *replaced };
/* The driver's functions of those names, by both ways to ask for them. */
static void *by_symbol[REPLACED], *by_address[REPLACED];

/* Asked for by name, not to be held: they take no lock that the driver's own lock needs, or are for us alone. */
static bool is_left_alone(const char *name) {
    return strcmp(name, "cuGetExportTable") == 0 || strncmp(name, "cuCheckpoint", 12) == 0 ||
           strcmp(name, "cuGetErrorString") == 0 || strcmp(name, "cuGetErrorName") == 0 ||
           strcmp(name, "cuDriverGetVersion") == 0;
}

static void *replace(const char *name, void *found) {
    for (size_t i = 0; i < REPLACED; i++)
        if (found == by_symbol[i] || found == by_address[i])
            return replaced[i].ours;
    return is_left_alone(name) ? found : wrap(found);
}

/* -- the driver's own functions ------------------------------------------------------------------------------------ */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool is_there;         /* all that we need of the driver */
bool direct_is_wanted = true;

static void find_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (library == NULL)
        return;
    const struct {
        const char *name;
        void *place;
    } wanted[] = {
        {"cuInit", &driver.cuInit},
        {"cuGetProcAddress_v2", &driver.cuGetProcAddress},
        {"cuCtxGetCurrent", &driver.cuCtxGetCurrent},
        {"cuCtxSetCurrent", &driver.cuCtxSetCurrent},
        {"cuCtxGetDevice", &driver.cuCtxGetDevice},
        {"cuCtxSynchronize", &driver.cuCtxSynchronize},
        {"cuStreamBeginCapture_v2", &driver.cuStreamBeginCapture_v2},
        {"cuStreamBeginCapture_v2_ptsz", &driver.cuStreamBeginCapture_v2_ptsz},
        {"cuStreamBeginCaptureToGraph", &driver.cuStreamBeginCaptureToGraph},
        {"cuStreamBeginCaptureToGraph_ptsz", &driver.cuStreamBeginCaptureToGraph_ptsz},
        {"cuStreamEndCapture", &driver.cuStreamEndCapture},
        {"cuStreamEndCapture_ptsz", &driver.cuStreamEndCapture_ptsz},
        {"cuCtxEnablePeerAccess", &driver.cuCtxEnablePeerAccess},
        {"cuCtxDestroy_v2", &driver.cuCtxDestroy},
        {"cuDeviceGetCount", &driver.cuDeviceGetCount},
        {"cuDeviceCanAccessPeer", &driver.cuDeviceCanAccessPeer},
        {"cuDeviceGetAttribute", &driver.cuDeviceGetAttribute},
        {"cuDeviceGetUuid", &driver.cuDeviceGetUuid},
        {"cuMemcpyHtoD_v2", &driver.cuMemcpyHtoD},
        {"cuMemAlloc_v2", &driver.cuMemAlloc},
        {"cuMemFree_v2", &driver.cuMemFree},
        {"cuMemCreate", &driver.cuMemCreate},
        {"cuMemRelease", &driver.cuMemRelease},
        {"cuMemAddressReserve", &driver.cuMemAddressReserve},
        {"cuMemAddressFree", &driver.cuMemAddressFree},
        {"cuMemMap", &driver.cuMemMap},
        {"cuMemUnmap", &driver.cuMemUnmap},
        {"cuMemSetAccess", &driver.cuMemSetAccess},
        {"cuMemExportToShareableHandle", &driver.cuMemExportToShareableHandle},
        {"cuMemRetainAllocationHandle", &driver.cuMemRetainAllocationHandle},
        {"cuMemImportFromShareableHandle", &driver.cuMemImportFromShareableHandle},
        {"cuMemGetAllocationPropertiesFromHandle", &driver.cuMemGetAllocationPropertiesFromHandle},
        {"cuMemGetHandleForAddressRange", &driver.cuMemGetHandleForAddressRange},
        {"cuIpcGetMemHandle", &driver.cuIpcGetMemHandle},
        {"cuIpcOpenMemHandle_v2", &driver.cuIpcOpenMemHandle},
        {"cuIpcCloseMemHandle", &driver.cuIpcCloseMemHandle},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *found = real_dlsym(library, wanted[i].name);
        if (found == NULL)
            return;
        memcpy(wanted[i].place, &found, sizeof found);
    }
    for (size_t i = 0; i < REPLACED; i++) {
        by_symbol[i] = real_dlsym(library, replaced[i].name);
        if (driver.cuGetProcAddress(replaced[i].asked, &by_address[i], replaced[i].version, replaced[i].flags, NULL) !=
            CUDA_SUCCESS)
            by_address[i] = NULL;
    }
    is_there = true;
}

/* -- dlsym --------------------------------------------------------------------------------------------------------- */

static void *(*dlsym_)(void *, const char *);

static void find_dlsym(void) {
    static const char *const versions[] = {"GLIBC_2.34", "GLIBC_2.2.5", "GLIBC_2.17"};
    for (size_t i = 0; i < sizeof versions / sizeof *versions && dlsym_ == NULL; i++) {
        void *found = dlvsym(RTLD_NEXT, "dlsym", versions[i]);
        memcpy(&dlsym_, &found, sizeof found);
    }
    if (dlsym_ == NULL)
        abort(); /* no such C library exists: this one was linked against it */
}

void *real_dlsym(void *library, const char *name) {
    if (dlsym_ == NULL)
        find_dlsym();
    return dlsym_(library, name);
}

static bool is_of_libcuda(void *found) {
    Dl_info about;
    const char *file;
    if (dladdr(found, &about) == 0 || about.dli_fname == NULL)
        return false;
    file = strrchr(about.dli_fname, '/');
    return strncmp(file ? file + 1 : about.dli_fname, "libcuda.so", 10) == 0;
}

static __attribute__((noinline)) void *look_up(void *library, const char *name) {
    void *found = real_dlsym(library, name);
    if (found == NULL || !is_of_libcuda(found))
        return found;
    if (self != NULL && self->depth > 0)
        return found; /* the driver asks for itself */
    struct thread *thread = gate_enter();
    pthread_once(&once, find_driver);
    gate_leave(thread);
    return is_there && direct_is_wanted ? replace(name, found) : found;
}

/* RTLD_NEXT and RTLD_DEFAULT depend on who asks, which the real one sees by its return address: so it is jumped to, not
 * called, whatever is not certainly about CUDA. (GCC and clang make a jump of it at -O2; a test sees to that.) */
PUBLIC void *dlsym(void *library, const char *name) {
    if (dlsym_ == NULL)
        find_dlsym();
    if (library == RTLD_NEXT || library == RTLD_DEFAULT || name[0] != 'c' || name[1] != 'u')
        return dlsym_(library, name);
    return look_up(library, name);
}

/* -- linking ------------------------------------------------------------------------------------------------------- */

/* Who links to libcuda finds these names here first, since this library comes before all others. */
static function link_to(const char *name, _Atomic(function) *place) {
    void *library = dlopen("libcuda.so.1", RTLD_LAZY);
    function found = library == NULL ? NULL : (function)look_up(library, name);
    atomic_store(place, found);
    return found;
}

#define ENTRY(name)                                                                                                    \
    PUBLIC long name(GIVEN);                                                                                           \
    PUBLIC long name(GIVEN) {                                                                                          \
        static _Atomic(function) place;                                                                                \
        function found = atomic_load_explicit(&place, memory_order_acquire);                                           \
        if (!LIKELY(found) && (found = link_to(#name, &place)) == NULL)                                                \
            return CUDA_ERROR_NOT_SUPPORTED;                                                                           \
        return found(AS_GIVEN);                                                                                        \
    }
ALL_ENTRIES

/* -- fork ---------------------------------------------------------------------------------------------------------- */

static void after_fork(void) {
    pthread_mutex_init(&lock, NULL);
    gate_after_fork();
    control_after_fork();
    memory_after_fork();
    contexts_after_fork();
    handles_after_fork();
    mappings_after_fork();
    sharing_after_fork();
}

__attribute__((constructor)) static void begin(void) {
    const char *wish = getenv("GPUSCHED_DIRECT");
    direct_is_wanted = wish == NULL || strcmp(wish, "0") != 0;
    pthread_atfork(NULL, NULL, after_fork);
}
