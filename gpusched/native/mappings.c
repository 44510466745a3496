/* Where the program has mapped physical memory, and who may access it there; so that it can be mapped again as it was.
 *
 * A piece may be mapped at several addresses, or in parts, and its mapping outlives its handle. The lock is never held
 * over a driver call, so what is noted follows what the driver did.
 */
#define _GNU_SOURCE
#include "direct.h"

#include <string.h>
#include <sys/mman.h>

/* -- the mappings -------------------------------------------------------------------------------------------------- */

struct mapping {
    CUdeviceptr address;
    size_t size, offset;
    uint64_t readable, writable; /* by which devices */
    uint32_t place;              /* of its memory */
    bool mapped, open;           /* open: its access is set */
};
/* In the order of their addresses. */
static struct {
    struct mapping *items;
    size_t count, room;
} mappings;

/* With the lock held: the first that ends after the address. */
static size_t first_after(CUdeviceptr address) {
    size_t low = 0, high = mappings.count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (mappings.items[middle].address + mappings.items[middle].size > address)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static bool mappings_make_room(void) {
    if (mappings.count < mappings.room)
        return true;
    size_t room = mappings.room ? mappings.room * 2 : 256;
    struct mapping *items = pages(room * sizeof *items);
    if (items == NULL)
        return false;
    if (mappings.items != NULL) {
        memcpy(items, mappings.items, mappings.count * sizeof *items);
        munmap(mappings.items, mappings.room * sizeof *mappings.items);
    }
    mappings.items = items;
    mappings.room = room;
    return true;
}

static bool note_mapping(const struct mapping *mapping) {
    if (!mappings_make_room())
        return false;
    size_t at = first_after(mapping->address);
    memmove(&mappings.items[at + 1], &mappings.items[at], (mappings.count - at) * sizeof *mappings.items);
    mappings.items[at] = *mapping;
    mappings.count++;
    return true;
}

/* -- what the program does ----------------------------------------------------------------------------------------- */

/* With the lock held. What is known of a name is kept alive for a mapping to come; else what comes is foreign. */
static bool begin_mapping(CUhandle name, struct mapping *mapping, CUhandle *handle) {
    *handle = name;
    struct memory *memory = handle_find(name);
    if (memory == NULL)
        return false;
    memory->mappings++;
    mapping->place = (uint32_t)(memory - table.items);
    *handle = memory->handle;
    return true;
}

CUresult mapping_make(CUdeviceptr address, size_t size, size_t offset, CUhandle name, uint64_t flags) {
    struct mapping mapping = {.address = address, .size = size, .offset = offset, .mapped = true};
    CUhandle handle, last = 0;
    context_note();
    table_lock();
    bool known = begin_mapping(name, &mapping, &handle);
    table_unlock();
    CUresult result = driver.cuMemMap(address, size, offset, handle, flags);
    const bool is_made = result == CUDA_SUCCESS;
    if (!known && is_made)
        handle_note_foreign(name);
    table_lock();
    if (known || (is_made && begin_mapping(name, &mapping, &handle))) {
        struct memory *memory = &table.items[mapping.place];
        if (!is_made || !note_mapping(&mapping)) {
            memory->mappings--;
            last = handle_let_go(memory);
            result = is_made ? CUDA_ERROR_OUT_OF_MEMORY : result;
        }
    }
    table_unlock();
    if (is_made && result != CUDA_SUCCESS)
        driver.cuMemUnmap(address, size);
    if (last != 0)
        driver.cuMemRelease(last);
    return result;
}

enum { AT_ONCE = 64 };

/* Forgets the first mappings that begin in the range; what is to be released with them. False: there are none. */
static bool forget_some(CUdeviceptr address, CUdeviceptr end, CUhandle *last, size_t *count) {
    *count = 0;
    table_lock();
    size_t from = first_after(address), to = from;
    for (; to < mappings.count && mappings.items[to].address < end && *count < AT_ONCE; to++) {
        struct memory *memory = &table.items[mappings.items[to].place];
        memory->mappings--;
        last[*count] = handle_let_go(memory);
        *count += last[*count] != 0;
    }
    memmove(&mappings.items[from], &mappings.items[to], (mappings.count - to) * sizeof *mappings.items);
    mappings.count -= to - from;
    table_unlock();
    return to > from;
}

CUresult mapping_end(CUdeviceptr address, size_t size) {
    CUresult result = driver.cuMemUnmap(address, size);
    CUhandle last[AT_ONCE];
    size_t count;
    while (result == CUDA_SUCCESS && forget_some(address, address + size, last, &count))
        for (size_t i = 0; i < count; i++)
            driver.cuMemRelease(last[i]);
    return result;
}

static void note_access(struct mapping *mapping, const struct access *access) {
    if (access->location.type != CU_MEM_LOCATION_TYPE_DEVICE || access->location.id < 0 ||
        access->location.id >= 64) {
        table.items[mapping->place].left = true;
        return;
    }
    const uint64_t device = 1ull << access->location.id;
    mapping->readable = access->flags & 1 ? mapping->readable | device : mapping->readable & ~device;
    mapping->writable = access->flags & 2 ? mapping->writable | device : mapping->writable & ~device;
    mapping->open = true;
}

CUresult mapping_set_access(CUdeviceptr address, size_t size, const struct access *access, size_t count) {
    CUresult result = driver.cuMemSetAccess(address, size, access, count);
    if (result != CUDA_SUCCESS)
        return result;
    context_note();
    table_lock();
    for (size_t i = first_after(address); i < mappings.count && mappings.items[i].address < address + size; i++) {
        struct mapping *mapping = &mappings.items[i];
        /* Of a part only: more than we keep in mind. */
        if (mapping->address < address || mapping->address + mapping->size > address + size)
            table.items[mapping->place].left = true;
        for (size_t k = 0; k < count; k++)
            note_access(mapping, &access[k]);
    }
    table_unlock();
    return result;
}

struct memory *mapping_at(CUdeviceptr address) {
    size_t at = first_after(address);
    if (at < mappings.count && mappings.items[at].address <= address)
        return &table.items[mappings.items[at].place];
    return NULL;
}

void mappings_leave(CUdeviceptr address, size_t size) {
    for (size_t i = first_after(address); i < mappings.count && mappings.items[i].address < address + size; i++)
        table.items[mappings.items[i].place].left = true;
}

/* -- while the gate is closed -------------------------------------------------------------------------------------- */

CUresult mappings_away(void) {
    for (size_t i = 0; i < mappings.count; i++) {
        struct mapping *mapping = &mappings.items[i];
        if (!mapping->mapped || !memory_is_movable(&table.items[mapping->place]))
            continue;
        CUresult result = driver.cuMemUnmap(mapping->address, mapping->size);
        if (result != CUDA_SUCCESS)
            return result;
        mapping->mapped = mapping->open = false;
    }
    return CUDA_SUCCESS;
}

/* As far as the one beginning at `from` and its neighbours have the same access. */
static size_t alike_until(size_t from) {
    const struct mapping *mapping = &mappings.items[from];
    size_t to = from + 1;
    for (; to < mappings.count; to++) {
        const struct mapping *next = &mappings.items[to];
        if (next->address != next[-1].address + next[-1].size || next->open || !next->mapped ||
            next->readable != mapping->readable || next->writable != mapping->writable ||
            table.items[next->place].device != table.items[mapping->place].device)
            break;
    }
    return to;
}

static CUresult open_range(const struct mapping *first, const struct mapping *last) {
    struct access access[64];
    size_t count = 0;
    for (int device = 0; device < 64; device++) {
        const int flags = (int)(first->readable >> device & 1) | (int)(first->writable >> device & 1) << 1;
        if (flags != 0)
            access[count++] = (struct access){{CU_MEM_LOCATION_TYPE_DEVICE, device}, flags};
    }
    if (count == 0)
        return CUDA_SUCCESS;
    return driver.cuMemSetAccess(first->address, last->address + last->size - first->address, access, count);
}

/* Neighbours at once, which is what takes the time; each by itself where they are not of one reservation. */
static CUresult open_alike(size_t from, size_t to) {
    CUresult result = open_range(&mappings.items[from], &mappings.items[to - 1]);
    if (result != CUDA_SUCCESS) {
        result = CUDA_SUCCESS;
        for (size_t i = from; i < to && result == CUDA_SUCCESS; i++)
            result = open_range(&mappings.items[i], &mappings.items[i]);
    }
    for (size_t i = from; i < to && result == CUDA_SUCCESS; i++)
        mappings.items[i].open = true;
    return result;
}

CUresult mappings_back(void) {
    for (size_t i = 0; i < mappings.count; i++) {
        struct mapping *mapping = &mappings.items[i];
        const struct memory *memory = &table.items[mapping->place];
        if (mapping->mapped || !memory_is_movable(memory))
            continue;
        CUresult result = driver.cuMemMap(mapping->address, mapping->size, mapping->offset, memory->handle, 0);
        if (result != CUDA_SUCCESS)
            return result;
        mapping->mapped = true;
    }
    for (size_t i = 0, to; i < mappings.count; i = to) {
        to = i + 1;
        if (mappings.items[i].open || !memory_is_movable(&table.items[mappings.items[i].place]))
            continue;
        to = alike_until(i);
        CUresult result = open_alike(i, to);
        if (result != CUDA_SUCCESS)
            return result;
    }
    return CUDA_SUCCESS;
}

void mappings_after_fork(void) {
    mappings.count = 0;
}
