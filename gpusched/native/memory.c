/* Device memory that is made of the driver's virtual memory calls, so that its contents can leave and come back.
 *
 * Every piece is one physical allocation. It may go; the addresses at which it was mapped stay reserved, so pointers,
 * CUDA graphs and whatever else holds addresses stay right. What cuMemAlloc is asked for gets a range of addresses of
 * its own here; what a program makes and maps by itself is in the same table (handles.c, mappings.c).
 */
#define _GNU_SOURCE
#include "direct.h"

#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

struct table table = {0};
static struct index addresses; /* of cuMemAlloc's */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

enum { GRANULARITY = 2 << 20, LEAST = 2 << 20, HIGH_FD = 500, MANY_FDS = 8192 };

/* -- the table ----------------------------------------------------------------------------------------------------- */

void table_lock(void) {
    pthread_mutex_lock(&lock);
}

void table_unlock(void) {
    pthread_mutex_unlock(&lock);
}

bool table_make_room(void) {
    if (table.count < table.room)
        return true;
    size_t room = table.room ? table.room * 2 : 256;
    struct memory *items = pages(room * sizeof *items);
    if (items == NULL)
        return false;
    if (table.items != NULL) {
        memcpy(items, table.items, table.count * sizeof *items);
        munmap(table.items, table.room * sizeof *items);
    }
    table.items = items;
    table.room = room;
    return true;
}

static uint32_t first_free = 0; /* no free place below it */

uint32_t table_add(const struct memory *memory) {
    uint32_t place = first_free;
    while (place < table.count && table.items[place].taken)
        place++;
    first_free = place + 1;
    table.items[place] = *memory;
    table.items[place].taken = true;
    table.foreign += memory->foreign;
    sharing_note();
    if (place == table.count)
        table.count++;
    return place;
}

void table_remove(uint32_t place) {
    table.foreign -= table.items[place].foreign;
    sharing_note();
    table.items[place].taken = false;
    if (place < first_free)
        first_free = place;
}

/* -- making and ending --------------------------------------------------------------------------------------------- */

CUresult memory_create(struct memory *memory) {
    driver.cuDeviceGetUuid(memory->gpu, memory->device); /* another one after a migration */
    return driver.cuMemCreate(&memory->handle, memory->size, &memory->properties, 0);
}

CUresult memory_map(struct memory *memory) {
    CUresult result = driver.cuMemMap(memory->address, memory->size, 0, memory->handle, 0);
    if (result != CUDA_SUCCESS)
        return result;
    struct access access[64];
    size_t count = 0;
    const uint64_t wanted = devices_present() | 1ull << memory->device;
    for (int device = 0; device < 64; device++)
        if (wanted >> device & 1)
            access[count++] = (struct access){{CU_MEM_LOCATION_TYPE_DEVICE, device}, CU_MEM_ACCESS_READWRITE};
    result = driver.cuMemSetAccess(memory->address, memory->size, access, count);
    memory->mapped = result == CUDA_SUCCESS;
    if (!memory->mapped)
        driver.cuMemUnmap(memory->address, memory->size);
    return result;
}

bool memory_is_possible(CUdevice device) {
    static _Atomic int known[64]; /* 1: yes, 2: no */
    if (device < 0 || device >= 64)
        return false;
    int answer = atomic_load_explicit(&known[device], memory_order_relaxed);
    if (answer == 0) {
        int virtual_ = 0, descriptors = 0;
        driver.cuDeviceGetAttribute(&virtual_, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device);
        driver.cuDeviceGetAttribute(
            &descriptors, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device);
        answer = virtual_ && descriptors ? 1 : 2;
        atomic_store_explicit(&known[device], answer, memory_order_relaxed);
    }
    return answer == 1;
}

static CUresult unmap(struct memory *memory) {
    CUresult result = driver.cuMemUnmap(memory->address, memory->size);
    if (result == CUDA_SUCCESS)
        memory->mapped = false;
    return result;
}

CUresult memory_release(struct memory *memory) {
    CUresult result = memory->mapped ? unmap(memory) : CUDA_SUCCESS;
    if (result != CUDA_SUCCESS || memory->handle == 0)
        return result;
    result = driver.cuMemRelease(memory->handle);
    memory->handle = 0;
    return result;
}

/* Everything but the entry in the table. False: nothing was made. */
static bool make(struct memory *memory, size_t size) {
    *memory = (struct memory){.size = (size + GRANULARITY - 1) / GRANULARITY * GRANULARITY, .fd = -1};
    if (memory->size < size || driver.cuCtxGetCurrent(&memory->context) != CUDA_SUCCESS || memory->context == NULL ||
        driver.cuCtxGetDevice(&memory->device) != CUDA_SUCCESS || !memory_is_possible(memory->device) ||
        !devices_reach_each_other())
        return false;
    memory->asked = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    memory->properties = (struct allocation_properties){
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .handle_types = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {CU_MEM_LOCATION_TYPE_DEVICE, memory->device},
    };
    if (memory_create(memory) != CUDA_SUCCESS)
        return false;
    if (driver.cuMemAddressReserve(&memory->address, memory->size, 0, 0, 0) == CUDA_SUCCESS) {
        if (memory_map(memory) == CUDA_SUCCESS)
            return true;
        driver.cuMemAddressFree(memory->address, memory->size);
    }
    driver.cuMemRelease(memory->handle);
    return false;
}

enum { AT_ONCE = 64 };

void memory_allow(CUdevice device) {
    const struct access access = {{CU_MEM_LOCATION_TYPE_DEVICE, device}, CU_MEM_ACCESS_READWRITE};
    struct memory some[AT_ONCE];
    size_t place = 0, found;
    do {
        table_lock();
        for (found = 0; place < table.count && found < AT_ONCE; place++)
            if (table.items[place].taken && table.items[place].mapped && table.items[place].device != device)
                some[found++] = table.items[place];
        table_unlock();
        for (size_t i = 0; i < found; i++) /* whoever frees it meanwhile has no use for it */
            driver.cuMemSetAccess(some[i].address, some[i].size, &access, 1);
    } while (found == AT_ONCE);
}

/* What we cannot make the driver makes, and says why where it cannot either. */
CUresult memory_alloc(CUdeviceptr *address, size_t size) {
    struct memory memory;
    context_note();
    const uint64_t before = devices_present();
    if (address == NULL || size < LEAST || !make(&memory, size))
        return driver.cuMemAlloc(address, size);
    table_lock();
    bool known = table_make_room() && index_make_room(&addresses);
    if (known)
        index_put(&addresses, memory.address, table_add(&memory));
    table_unlock();
    if (!known) {
        memory_release(&memory);
        driver.cuMemAddressFree(memory.address, memory.size);
        return driver.cuMemAlloc(address, size);
    }
    const uint64_t since = devices_present() & ~before; /* they may not have seen it */
    for (CUdevice device = 0; device < 64; device++)
        if (since >> device & 1)
            memory_allow(device);
    *address = memory.address;
    return CUDA_SUCCESS;
}

/* The address is nobody's any more. False: it is none of ours. The memory lives on where the program has asked for a
 * handle of it; then there is nothing to release in what is `taken_out`. */
static bool take_out(CUdeviceptr address, struct memory *taken_out) {
    uint32_t place;
    table_lock();
    bool found = index_find(&addresses, address, &place);
    if (found) {
        struct memory *memory = &table.items[place];
        *taken_out = *memory;
        index_remove(&addresses, address);
        memory->address = 0;
        memory->context = NULL;
        memory->mapped = false;
        if (memory->references == 0 && memory->mappings == 0)
            table_remove(place);
        else
            taken_out->handle = 0;
    }
    table_unlock();
    return found;
}

struct memory *memory_at(CUdeviceptr address) {
    for (size_t i = 0; i < table.count; i++) {
        struct memory *memory = &table.items[i];
        if (memory->taken && memory->address != 0 && memory->address <= address &&
            address < memory->address + memory->size)
            return memory;
    }
    return NULL;
}

CUresult memory_free(CUdeviceptr address) {
    uint32_t place;
    table_lock();
    bool ours = index_find(&addresses, address, &place);
    table_unlock();
    if (!ours)
        return driver.cuMemFree(address);
    /* As the driver's own free, which waits for what may still use the memory. */
    CUresult result = driver.cuCtxSynchronize();
    if (result != CUDA_SUCCESS)
        return result;
    struct memory memory;
    if (!take_out(address, &memory))
        return CUDA_ERROR_INVALID_VALUE; /* freed twice at once */
    result = memory_release(&memory);
    driver.cuMemAddressFree(memory.address, memory.size);
    return result;
}

void memory_end(CUcontext context) {
    struct memory memory;
    CUdeviceptr address;
    do {
        address = 0;
        table_lock();
        for (size_t i = 0; i < table.count && address == 0; i++)
            if (table.items[i].taken && table.items[i].context == context)
                address = table.items[i].address;
        table_unlock();
        if (address != 0 && take_out(address, &memory)) {
            memory_release(&memory);
            driver.cuMemAddressFree(memory.address, memory.size);
        }
    } while (address != 0);
}

/* -- while the gate is closed -------------------------------------------------------------------------------------- */

CUcontext memory_context(const struct memory *memory) {
    return memory->context != NULL ? memory->context : context_of(memory->device);
}

bool memory_is_movable(const struct memory *memory) {
    /* With something foreign there may be bindings that nobody told us of, of what can be named by a handle. */
    const bool may_be_bound = table.foreign > 0 && (memory->address == 0 || memory->references > 0);
    return memory->taken && !memory->left && !may_be_bound && memory_context(memory) != NULL;
}

size_t memory_movable_bytes(void) {
    size_t bytes = 0;
    for (size_t i = 0; i < table.count; i++)
        bytes += memory_is_movable(&table.items[i]) ? table.items[i].size : 0;
    return bytes;
}

/* The soft limit of descriptors as it was before so many were needed. */
static struct rlimit before;

void memory_raise_limit(void) {
    struct rlimit now;
    if (before.rlim_max != 0 || getrlimit(RLIMIT_NOFILE, &now) != 0 || now.rlim_cur == now.rlim_max ||
        now.rlim_cur >= MANY_FDS + table.count)
        return;
    before = now;
    now.rlim_cur = now.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &now) != 0)
        before = (struct rlimit){0};
}

static void lower_limit(void) {
    struct rlimit now;
    if (before.rlim_max != 0 && getrlimit(RLIMIT_NOFILE, &now) == 0 && now.rlim_cur == before.rlim_max &&
        now.rlim_max == before.rlim_max)
        setrlimit(RLIMIT_NOFILE, &before);
    before = (struct rlimit){0};
}

int descriptor_move_up(int fd) {
    int least = before.rlim_max != 0 && before.rlim_cur > HIGH_FD ? (int)before.rlim_cur : HIGH_FD;
    int high = fcntl(fd, F_DUPFD_CLOEXEC, least);
    if (high < 0)
        return fd;
    close(fd);
    return high;
}

CUresult memory_export(struct memory *memory) {
    if (memory->fd >= 0)
        return CUDA_SUCCESS;
    int fd = -1;
    CUresult result =
        driver.cuMemExportToShareableHandle(&fd, memory->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (result == CUDA_SUCCESS)
        memory->fd = descriptor_move_up(fd);
    return result;
}

void memory_drop_fd(struct memory *memory) {
    if (memory->taken && memory->fd >= 0)
        close(memory->fd);
    memory->fd = -1;
}

void memory_drop_all(void) {
    for (size_t i = 0; i < table.count; i++)
        memory_drop_fd(&table.items[i]);
    lower_limit();
}

static CUresult copy_in(struct memory *memory, CUdeviceptr address, const void *contents) {
    struct access access = {{CU_MEM_LOCATION_TYPE_DEVICE, memory->device}, CU_MEM_ACCESS_READWRITE};
    CUresult result = driver.cuMemMap(address, memory->size, 0, memory->handle, 0);
    if (result != CUDA_SUCCESS)
        return result;
    result = driver.cuMemSetAccess(address, memory->size, &access, 1);
    if (result == CUDA_SUCCESS)
        result = driver.cuMemcpyHtoD(address, contents, memory->size);
    driver.cuMemUnmap(address, memory->size);
    return result;
}

/* Where the program has mapped it, that may be a part of it, or not to be written to: so not there. */
CUresult memory_fill(struct memory *memory, const void *contents) {
    if (memory->address != 0)
        return driver.cuMemcpyHtoD(memory->address, contents, memory->size);
    CUdeviceptr address;
    CUresult result = driver.cuMemAddressReserve(&address, memory->size, 0, 0, 0);
    if (result == CUDA_SUCCESS) {
        result = copy_in(memory, address, contents);
        driver.cuMemAddressFree(address, memory->size);
    }
    return result;
}

/* CUDA does not survive a fork: what the child has in its table is not its own. */
void memory_after_fork(void) {
    pthread_mutex_init(&lock, NULL);
    memory_drop_all();
    table.count = table.foreign = 0;
    first_free = 0;
    index_clear(&addresses);
}
