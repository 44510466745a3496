/* Numbers, such as addresses and handles, to places in a table: open addressing, at most half full. */
#define _GNU_SOURCE
#include "direct.h"

#include <string.h>
#include <sys/mman.h>

enum { LEAST_ROOM = 512, REMOVED = UINT32_MAX };

void *pages(size_t size) {
    void *found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return found == MAP_FAILED ? NULL : found;
}

static struct slot *first_slot(const struct index *index, uint64_t key) {
    return &index->slots[(key * 0x9E3779B97F4A7C15ull >> 32) & (index->room - 1)];
}

static struct slot *next_slot(const struct index *index, struct slot *slot) {
    return ++slot == index->slots + index->room ? index->slots : slot;
}

static struct slot *find(const struct index *index, uint64_t key) {
    if (index->room == 0)
        return NULL;
    struct slot *slot = first_slot(index, key);
    while (slot->place != 0 && (slot->place == REMOVED || slot->key != key))
        slot = next_slot(index, slot);
    return slot->place != 0 ? slot : NULL;
}

bool index_find(const struct index *index, uint64_t key, uint32_t *place) {
    const struct slot *slot = find(index, key);
    if (slot != NULL)
        *place = slot->place - 1;
    return slot != NULL;
}

void index_put(struct index *index, uint64_t key, uint32_t place) {
    struct slot *slot = first_slot(index, key);
    while (slot->place != 0 && slot->place != REMOVED)
        slot = next_slot(index, slot);
    index->used += slot->place == 0;
    *slot = (struct slot){key, place + 1};
}

void index_remove(struct index *index, uint64_t key) {
    struct slot *slot = find(index, key);
    if (slot != NULL)
        slot->place = REMOVED;
}

bool index_make_room(struct index *index) {
    if (index->room > 0 && (index->used + 1) * 2 <= index->room)
        return true;
    size_t live = 0;
    for (size_t i = 0; i < index->room; i++)
        live += index->slots[i].place != 0 && index->slots[i].place != REMOVED;
    struct index bigger = {.room = LEAST_ROOM};
    while (bigger.room < (live + 1) * 4)
        bigger.room *= 2;
    bigger.slots = pages(bigger.room * sizeof *bigger.slots);
    if (bigger.slots == NULL)
        return false;
    for (size_t i = 0; i < index->room; i++)
        if (index->slots[i].place != 0 && index->slots[i].place != REMOVED)
            index_put(&bigger, index->slots[i].key, index->slots[i].place - 1);
    if (index->slots != NULL)
        munmap(index->slots, index->room * sizeof *index->slots);
    *index = bigger;
    return true;
}

void index_clear(struct index *index) {
    if (index->slots != NULL)
        memset(index->slots, 0, index->room * sizeof *index->slots);
    index->used = 0;
}
