/* Device memory that is made of the driver's virtual memory calls, so that its contents can leave and come back.
 *
 * Every piece is one physical allocation with a range of addresses of its own. The physical allocation may go; the
 * addresses stay reserved, so pointers, CUDA graphs and whatever else holds addresses stay right.
 */
#define _GNU_SOURCE
#include "direct.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct table table = {0};
/* Never held by a thread that waits at the gate: it is taken inside, where nobody is when the gate is closed. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

enum { GRANULARITY = 2 << 20, LEAST = 2 << 20 };

/* -- the table ----------------------------------------------------------------------------------------------------- */

/* Address -> 1 + place in the table; open addressing, at most half full. */
static struct index {
    uint32_t *slots;
    size_t room, used; /* used: removed ones included */
} index_;

enum { REMOVED = UINT32_MAX };

static size_t slot_of(CUdeviceptr address, size_t room) {
    return (size_t)((address / GRANULARITY) * 0x9E3779B97F4A7C15ull >> 20) & (room - 1);
}

static void *pages(size_t size) {
    void *found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return found == MAP_FAILED ? NULL : found;
}

static void index_put(struct index *index, CUdeviceptr address, uint32_t place) {
    size_t slot = slot_of(address, index->room);
    while (index->slots[slot] != 0 && index->slots[slot] != REMOVED)
        slot = (slot + 1) & (index->room - 1);
    index->used += index->slots[slot] == 0;
    index->slots[slot] = place + 1;
}

static bool make_room(void) {
    if (table.count == table.room) {
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
    }
    if (index_.used * 2 >= index_.room) {
        struct index bigger = {.room = table.room * 4};
        bigger.slots = pages(bigger.room * sizeof *bigger.slots);
        if (bigger.slots == NULL)
            return false;
        for (size_t i = 0; i < table.count; i++)
            if (table.items[i].address)
                index_put(&bigger, table.items[i].address, (uint32_t)i);
        if (index_.slots != NULL)
            munmap(index_.slots, index_.room * sizeof *index_.slots);
        index_ = bigger;
    }
    return true;
}

static uint32_t *index_find(CUdeviceptr address) {
    if (index_.room == 0)
        return NULL;
    for (size_t slot = slot_of(address, index_.room); index_.slots[slot] != 0;
         slot = (slot + 1) & (index_.room - 1)) {
        uint32_t at = index_.slots[slot];
        if (at != REMOVED && table.items[at - 1].address == address)
            return &index_.slots[slot];
    }
    return NULL;
}

static uint32_t first_free = 0; /* no free place below it */

static void table_add(const struct memory *memory) {
    uint32_t place = first_free;
    while (place < table.count && table.items[place].address)
        place++;
    first_free = place + 1;
    table.items[place] = *memory;
    if (place == table.count)
        table.count++;
    table.bytes += memory->size;
    index_put(&index_, memory->address, place);
}

static void table_remove(uint32_t *slot) {
    struct memory *memory = &table.items[*slot - 1];
    table.bytes -= memory->size;
    memory->address = 0;
    if (*slot - 1 < first_free)
        first_free = *slot - 1;
    *slot = REMOVED;
}

/* -- making and ending --------------------------------------------------------------------------------------------- */

CUresult memory_create(struct memory *memory) {
    struct allocation_properties properties = {
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .handle_types = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {CU_MEM_LOCATION_TYPE_DEVICE, memory->device},
    };
    driver.cuDeviceGetUuid(memory->gpu, memory->device); /* another one after a migration */
    return driver.cuMemCreate(&memory->handle, memory->size, &properties, 0);
}

CUresult memory_map(struct memory *memory) {
    CUresult result = driver.cuMemMap(memory->address, memory->size, 0, memory->handle, 0);
    if (result != CUDA_SUCCESS)
        return result;
    struct access access = {{CU_MEM_LOCATION_TYPE_DEVICE, memory->device}, CU_MEM_ACCESS_READWRITE};
    result = driver.cuMemSetAccess(memory->address, memory->size, &access, 1);
    memory->mapped = result == CUDA_SUCCESS;
    if (!memory->mapped)
        driver.cuMemUnmap(memory->address, memory->size);
    return result;
}

static bool is_possible(CUdevice device) {
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

/* Everything but the entry in the table. False: nothing was made. */
static bool make(struct memory *memory, size_t size) {
    *memory = (struct memory){.size = (size + GRANULARITY - 1) / GRANULARITY * GRANULARITY, .fd = -1};
    if (memory->size < size || driver.cuCtxGetCurrent(&memory->context) != CUDA_SUCCESS || memory->context == NULL ||
        driver.cuCtxGetDevice(&memory->device) != CUDA_SUCCESS || !is_possible(memory->device))
        return false;
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

/* What we cannot make the driver makes, and says why where it cannot either. */
CUresult memory_alloc(CUdeviceptr *address, size_t size) {
    struct memory memory;
    if (address == NULL || size < LEAST || !make(&memory, size))
        return driver.cuMemAlloc(address, size);
    pthread_mutex_lock(&lock);
    bool known = make_room();
    if (known)
        table_add(&memory);
    pthread_mutex_unlock(&lock);
    if (!known) {
        memory_unmap(&memory);
        driver.cuMemAddressFree(memory.address, memory.size);
        return driver.cuMemAlloc(address, size);
    }
    *address = memory.address;
    return CUDA_SUCCESS;
}

CUresult memory_free(CUdeviceptr address) {
    pthread_mutex_lock(&lock);
    bool ours = index_find(address) != NULL;
    pthread_mutex_unlock(&lock);
    if (!ours)
        return driver.cuMemFree(address);
    /* As the driver's own free, which waits for what may still use the memory. */
    CUresult result = driver.cuCtxSynchronize();
    if (result != CUDA_SUCCESS)
        return result;
    pthread_mutex_lock(&lock);
    uint32_t *slot = index_find(address);
    struct memory memory = {0};
    if (slot != NULL) {
        memory = table.items[*slot - 1];
        table_remove(slot);
    }
    pthread_mutex_unlock(&lock);
    if (slot == NULL)
        return CUDA_ERROR_INVALID_VALUE; /* freed twice at once */
    result = memory_unmap(&memory);
    driver.cuMemAddressFree(memory.address, memory.size);
    return result;
}

/* -- while the gate is closed -------------------------------------------------------------------------------------- */

CUresult memory_synchronize(void) {
    CUcontext last = NULL;
    for (size_t i = 0; i < table.count; i++) {
        struct memory *memory = &table.items[i];
        if (!memory->address || memory->context == last)
            continue;
        CUresult result = driver.cuCtxSetCurrent(memory->context);
        if (result == CUDA_SUCCESS)
            result = driver.cuCtxSynchronize();
        if (result != CUDA_SUCCESS)
            return result;
        last = memory->context;
    }
    return CUDA_SUCCESS;
}

CUresult memory_export(struct memory *memory) {
    if (memory->fd >= 0)
        return CUDA_SUCCESS;
    int fd = -1;
    CUresult result =
        driver.cuMemExportToShareableHandle(&fd, memory->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (result == CUDA_SUCCESS)
        memory->fd = fd;
    return result;
}

CUresult memory_unmap(struct memory *memory) {
    CUresult result = driver.cuMemUnmap(memory->address, memory->size);
    if (result != CUDA_SUCCESS)
        return result;
    memory->mapped = false;
    result = driver.cuMemRelease(memory->handle);
    memory->handle = 0;
    return result;
}

void memory_drop_fd(struct memory *memory) {
    if (memory->address && memory->fd >= 0)
        close(memory->fd);
    memory->fd = -1;
}

/* CUDA does not survive a fork: what the child has in its table is not its own. */
void memory_after_fork(void) {
    pthread_mutex_init(&lock, NULL);
    for (size_t i = 0; i < table.count; i++)
        memory_drop_fd(&table.items[i]);
    table.count = table.bytes = 0;
    first_free = 0;
    if (index_.slots != NULL)
        memset(index_.slots, 0, index_.room * sizeof *index_.slots);
    index_.used = 0;
}
