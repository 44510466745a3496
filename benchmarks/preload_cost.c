/* Times calls of libcuda as a program makes them under the preloaded library, and by the driver's own functions, by
 * turns in one process: what the machine does meanwhile meets both.
 *
 * preload_cost TURNS prints {"what": {"without": [...], "with": [...]}} as JSON, microseconds a call (a launch, or an allocation with its
 * free), one number for each turn. The driver's own functions are found in its symbol table, since dlsym finds the
 * library's.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef unsigned long long Address;
struct calls {
    int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
    int (*synchronize)(void);
    int (*alloc)(Address *, size_t);
    int (*free)(Address);
};

enum { MOST_TURNS = 1000, LAUNCHES = 10000, HELD = 32, CHANGES = 64 };
static const size_t MIB = 1 << 20;
static const char KERNEL[] = ".version 7.0\n.target sm_50\n.address_size 64\n"
                             ".visible .entry nothing(.param .u64 words, .param .u64 count) { ret; }\n";

static void require(int result, const char *what) {
    if (result != 0) {
        fprintf(stderr, "%s: error %d\n", what, result);
        exit(1);
    }
}

static void *library;

static void *as_programs_find_it(const char *name) {
    void *found = dlsym(library, name);
    require(found == NULL, name);
    return found;
}

/* By the GNU hash table of the driver, which leads to its symbols. */
static void *the_drivers_own(const char *name) {
    struct link_map *map;
    require(dlinfo(library, RTLD_DI_LINKMAP, &map), "dlinfo");
    const ElfW(Sym) *symbols = NULL;
    const char *strings = NULL;
    const uint32_t *hashes = NULL;
    for (const ElfW(Dyn) *entry = map->l_ld; entry->d_tag != DT_NULL; entry++) {
        if (entry->d_tag == DT_SYMTAB)
            symbols = (const void *)entry->d_un.d_ptr;
        else if (entry->d_tag == DT_STRTAB)
            strings = (const void *)entry->d_un.d_ptr;
        else if (entry->d_tag == DT_GNU_HASH)
            hashes = (const void *)entry->d_un.d_ptr;
    }
    require(symbols == NULL || strings == NULL || hashes == NULL, "no symbol table");
    uint32_t hash = 5381;
    for (const char *c = name; *c != 0; c++)
        hash = hash * 33 + (unsigned char)*c;
    const uint32_t buckets = hashes[0], first = hashes[1], bloom_words = hashes[2];
    const uint32_t *bucket = hashes + 4 + bloom_words * sizeof(ElfW(Addr)) / sizeof *hashes;
    const uint32_t *chain = bucket + buckets;
    for (uint32_t i = bucket[hash % buckets]; i >= first; i++) {
        if (strcmp(strings + symbols[i].st_name, name) == 0)
            return (void *)(map->l_addr + symbols[i].st_value);
        if (chain[i - first] & 1)
            break;
    }
    require(1, name);
    return NULL;
}

static struct calls found_by(void *(*find)(const char *)) {
    return (struct calls){
        .launch = find("cuLaunchKernel"),
        .synchronize = find("cuCtxSynchronize"),
        .alloc = find("cuMemAlloc_v2"),
        .free = find("cuMemFree_v2"),
    };
}

static double now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

/* -- the loops: microseconds a call -------------------------------------------------------------------------------- */

static void *kernel;

static double launch(const struct calls *calls, size_t unused) {
    (void)unused;
    Address words = 0;
    size_t count = 0;
    void *parameters[] = {&words, &count};
    const double begun = now_us();
    for (int i = 0; i < LAUNCHES; i++)
        require(calls->launch(kernel, 1, 1, 1, 1, 1, 1, 0, NULL, parameters, NULL), "cuLaunchKernel");
    require(calls->synchronize(), "cuCtxSynchronize");
    return (now_us() - begun) / LAUNCHES;
}

static double allocate(const struct calls *calls, size_t size) {
    const int times = size > 64 * MIB ? 2 : 20;
    const double begun = now_us();
    for (int i = 0; i < times; i++) {
        Address address;
        require(calls->alloc(&address, size), "cuMemAlloc");
        require(calls->free(address), "cuMemFree");
    }
    return (now_us() - begun) / times;
}

/* 16 KiB to 32 MiB, small ones as often as large ones. */
static size_t some_size(uint32_t *chance) {
    *chance = *chance * 1664525 + 1013904223;
    return ((size_t)16 << 10) << (*chance >> 16) % 12;
}

/* Some are held; one after the other is replaced by another of some size. */
static double mix(const struct calls *calls, size_t unused) {
    (void)unused;
    Address held[HELD];
    uint32_t chance = 1;
    for (int i = 0; i < HELD; i++)
        require(calls->alloc(&held[i], some_size(&chance)), "cuMemAlloc");
    const double begun = now_us();
    for (int i = 0; i < CHANGES; i++) {
        require(calls->free(held[i % HELD]), "cuMemFree");
        require(calls->alloc(&held[i % HELD], some_size(&chance)), "cuMemAlloc");
    }
    const double took = now_us() - begun;
    for (int i = 0; i < HELD; i++)
        require(calls->free(held[i]), "cuMemFree");
    return took / CHANGES;
}

/* ------------------------------------------------------------------------------------------------------------------ */

static void prepare(void) {
    int (*init)(unsigned) = as_programs_find_it("cuInit");
    int (*retain)(void **, int) = as_programs_find_it("cuDevicePrimaryCtxRetain");
    int (*set_current)(void *) = as_programs_find_it("cuCtxSetCurrent");
    int (*load)(void **, const void *) = as_programs_find_it("cuModuleLoadData");
    int (*function)(void **, void *, const char *) = as_programs_find_it("cuModuleGetFunction");
    void *context, *module;
    require(init(0), "cuInit");
    require(retain(&context, 0), "cuDevicePrimaryCtxRetain");
    require(set_current(context), "cuCtxSetCurrent");
    require(load(&module, KERNEL), "cuModuleLoadData");
    require(function(&kernel, module, "nothing"), "cuModuleGetFunction");
}

static void print(const char *which, const double *times, int turns) {
    printf("\"%s\": [", which);
    for (int i = 0; i < turns; i++)
        printf("%s%.4f", i ? ", " : "", times[i]);
    printf("]");
}

int main(int count, char **arguments) {
    const int turns = count == 2 ? atoi(arguments[1]) : 0;
    require(turns < 1 || turns > MOST_TURNS, "usage: preload_cost TURNS");
    const struct {
        const char *what;
        double (*loop)(const struct calls *, size_t);
        size_t size;
    } loops[] = {
        {"launch", launch, 0},
        {"allocations of mixed sizes", mix, 0},
        {"alloc 1 MiB", allocate, MIB},
        {"alloc 2 MiB", allocate, 2 * MIB},
        {"alloc 20 MiB", allocate, 20 * MIB},
        {"alloc 512 MiB", allocate, 512 * MIB},
    };
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET((size_t)sched_getcpu(), &here);
    library = dlopen("libcuda.so.1", RTLD_NOW);
    require(library == NULL, "no libcuda.so.1");
    prepare();
    sched_setaffinity(0, sizeof here, &here); /* after the driver has started its threads */
    const struct calls without = found_by(the_drivers_own), with = found_by(as_programs_find_it);
    require(without.launch == with.launch, "the library is not preloaded, or has stepped aside");
    for (size_t n = 0; n < sizeof loops / sizeof *loops; n++) {
        double times[2][MOST_TURNS];
        for (int turn = -2; turn < turns; turn++) {
            const double first = loops[n].loop(turn & 1 ? &with : &without, loops[n].size);
            const double second = loops[n].loop(turn & 1 ? &without : &with, loops[n].size);
            if (turn >= 0) {
                times[0][turn] = turn & 1 ? second : first;
                times[1][turn] = turn & 1 ? first : second;
            }
        }
        printf("%s\"%s\": {", n ? ", " : "{", loops[n].what);
        print("without", times[0], turns);
        printf(", ");
        print("with", times[1], turns);
        printf("}");
        fflush(stdout);
    }
    printf("}\n");
    return 0;
}
