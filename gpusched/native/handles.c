/* Physical memory that the program makes itself (cuMemCreate), and what it calls it by.
 *
 * The program's word for such memory is a handle. The driver's own handle changes when the memory leaves and is made
 * anew, so from then on the two differ: what the program says is looked up here. Until then they are the same, and so
 * calls that we do not see get the right one.
 *
 * A thread that is in here is inside the gate: nothing leaves meanwhile. The lock is never held over a driver call.
 */
#define _GNU_SOURCE
#include "direct.h"

#include <string.h>

/* -- names --------------------------------------------------------------------------------------------------------- */

static struct index names;

/* No address, and no number that the driver would count to. */
static const uint64_t OUR_NAMES = 0x6770000000000000ull;

/* With the lock held, and room in the index. The driver may give a number again of which we still have the name. */
static void give_name(uint32_t place) {
    struct memory *memory = &table.items[place];
    uint32_t other;
    memory->name = index_find(&names, memory->handle, &other) ? OUR_NAMES | place : memory->handle;
    index_put(&names, memory->name, place);
}

struct memory *handle_find(CUhandle name) {
    uint32_t place;
    return index_find(&names, name, &place) ? &table.items[place] : NULL;
}

CUhandle handle_let_go(struct memory *memory) {
    if (memory->references > 0 || memory->mappings > 0 || memory->address != 0)
        return 0;
    CUhandle handle = memory->handle;
    memory_drop_fd(memory);
    table_remove((uint32_t)(memory - table.items));
    return handle;
}

/* With the lock held. Into the table, under the name that is returned; 0: there was no room. */
static CUhandle enter(const struct memory *memory) {
    if (!table_make_room() || !index_make_room(&names))
        return 0;
    uint32_t place = table_add(memory);
    give_name(place);
    return table.items[place].name;
}

static CUhandle enter_locking(const struct memory *memory) {
    table_lock();
    CUhandle name = enter(memory);
    table_unlock();
    return name;
}

/* What the driver calls it. Of a name that we do not know: itself. */
static CUhandle drivers(CUhandle name) {
    table_lock();
    const struct memory *memory = handle_find(name);
    CUhandle handle = memory != NULL ? memory->handle : name;
    table_unlock();
    return handle;
}

void handle_note_foreign(CUhandle name) {
    const struct memory memory = {.left = true, .foreign = true, .references = 1, .handle = name, .fd = -1};
    table_lock();
    if (handle_find(name) == NULL)
        enter(&memory);
    table_unlock();
}

/* -- making and ending --------------------------------------------------------------------------------------------- */

/* What can be made again as it was, and handed over: nothing that is special in any way. */
static bool is_plain(size_t size, const struct allocation_properties *wanted, uint64_t flags) {
    static const unsigned char nothing[sizeof wanted->reserved];
    return wanted->type == CU_MEM_ALLOCATION_TYPE_PINNED &&
           (wanted->handle_types & ~CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) == 0 &&
           wanted->location.type == CU_MEM_LOCATION_TYPE_DEVICE && wanted->win32_metadata == NULL &&
           wanted->compression == 0 && wanted->usage == 0 &&
           memcmp(wanted->reserved, nothing, sizeof nothing) == 0 && flags == 0 && size % (2 << 20) == 0;
}

CUresult handle_create(CUhandle *handle, size_t size, const struct allocation_properties *wanted, uint64_t flags) {
    if (handle == NULL || wanted == NULL)
        return driver.cuMemCreate(handle, size, wanted, flags);
    struct memory memory = {
        .left = true, .references = 1, .size = size, .properties = *wanted, .asked = wanted->handle_types, .fd = -1};
    CUresult result = CUDA_ERROR_NOT_SUPPORTED;
    context_note();
    if (is_plain(size, wanted, flags) && memory_is_possible(wanted->location.id)) {
        memory.device = wanted->location.id;
        memory.properties.handle_types = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        result = memory_create(&memory);
        memory.left = result != CUDA_SUCCESS;
    }
    if (memory.left && result != CUDA_ERROR_OUT_OF_MEMORY)
        result = driver.cuMemCreate(&memory.handle, size, wanted, flags);
    if (result != CUDA_SUCCESS)
        return result;
    CUhandle name = enter_locking(&memory);
    *handle = name != 0 ? name : memory.handle;
    return CUDA_SUCCESS;
}

CUresult handle_release(CUhandle name) {
    CUhandle last = name;
    table_lock();
    struct memory *memory = handle_find(name);
    if (memory != NULL) {
        if (--memory->references == 0) {
            index_remove(&names, name);
            memory->name = 0;
        }
        last = handle_let_go(memory);
    }
    table_unlock();
    return last != 0 ? driver.cuMemRelease(last) : CUDA_SUCCESS;
}

/* -- handles of what is there, and sharing ------------------------------------------------------------------------- */

CUresult handle_retain(CUhandle *handle, void *address) {
    if (handle == NULL)
        return driver.cuMemRetainAllocationHandle(handle, address);
    CUresult result = CUDA_SUCCESS;
    table_lock();
    struct memory *memory = mapping_at((CUdeviceptr)(uintptr_t)address);
    if (memory == NULL)
        memory = memory_at((CUdeviceptr)(uintptr_t)address);
    if (memory != NULL && memory->references == 0) {
        if (index_make_room(&names))
            give_name((uint32_t)(memory - table.items));
        else
            result = CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (memory != NULL && result == CUDA_SUCCESS) {
        memory->references++;
        *handle = memory->name;
    }
    table_unlock();
    return memory != NULL ? result : driver.cuMemRetainAllocationHandle(handle, address);
}

/* Others have it, or may: the same memory must stay under it. */
CUresult handle_export(void *shareable, CUhandle name, int type, uint64_t flags) {
    CUresult result = driver.cuMemExportToShareableHandle(shareable, drivers(name), type, flags);
    if (result != CUDA_SUCCESS)
        return result;
    handle_note_foreign(name); /* if we do not know it */
    table_lock();
    struct memory *memory = handle_find(name);
    if (memory != NULL)
        memory->left = true;
    table_unlock();
    return result;
}

CUresult handle_import(CUhandle *handle, void *shareable, int type) {
    CUresult result = driver.cuMemImportFromShareableHandle(handle, shareable, type);
    if (result != CUDA_SUCCESS)
        return result;
    const struct memory memory = {.left = true, .foreign = true, .references = 1, .handle = *handle, .fd = -1};
    CUhandle name = enter_locking(&memory);
    if (name != 0)
        *handle = name;
    return result;
}

CUresult handle_properties(struct allocation_properties *properties, CUhandle name) {
    CUresult result = driver.cuMemGetAllocationPropertiesFromHandle(properties, drivers(name));
    table_lock();
    const struct memory *memory = handle_find(name);
    if (result == CUDA_SUCCESS && memory != NULL && !memory->foreign)
        properties->handle_types = memory->asked;
    table_unlock();
    return result;
}

/* A descriptor of what is at the addresses, for other devices. */
CUresult handle_for_range(void *handle, CUdeviceptr address, size_t size, int type, uint64_t flags) {
    CUresult result = driver.cuMemGetHandleForAddressRange(handle, address, size, type, flags);
    if (result != CUDA_SUCCESS)
        return result;
    table_lock();
    mappings_leave(address, size);
    for (size_t i = 0; i < table.count; i++) {
        struct memory *memory = &table.items[i];
        if (memory->taken && memory->address != 0 && memory->address < address + size &&
            address < memory->address + memory->size)
            memory->left = true;
    }
    table_unlock();
    return result;
}

void handles_after_fork(void) {
    index_clear(&names);
}
