/* Huge pages for what the driver's own copy makes: one anonymous mapping, populated at once, as large as all of a
 * process's device memory. Half of the time of such a checkpoint goes into its first touch, page by page.
 *
 * Everything else goes to the kernel as it is.
 */
#define _GNU_SOURCE
#include "direct.h"

#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

enum { HUGE = 2 << 20, LEAST_BYTES = 64 << 20 };

static void *kernels(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    return (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
}

/* Aligned, so that all of it can be huge pages. As MAP_POPULATE, this does not fail for want of memory. */
static void *huge(size_t length, int protection, int flags) {
    char *start = kernels(NULL, length + HUGE, protection, flags & ~MAP_POPULATE, -1, 0);
    if (start == MAP_FAILED)
        return MAP_FAILED;
    size_t end = (length + 4095) & ~(size_t)4095;
    size_t before = (HUGE - (uintptr_t)start % HUGE) % HUGE;
    if (before > 0)
        munmap(start, before);
    munmap(start + before + end, HUGE - before);
    int saved = errno;
    madvise(start + before, end, MADV_HUGEPAGE);
    madvise(start + before, end, MADV_POPULATE_WRITE); /* where the kernel cannot, first touch does */
    errno = saved;
    return start + before;
}

PUBLIC void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    enum { ALL = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE };
    if (!LIKELY((flags & ALL) != ALL) && address == NULL && length >= LEAST_BYTES && !(flags & MAP_HUGETLB) &&
        direct_is_wanted) {
        void *found = huge(length, protection, flags);
        if (found != MAP_FAILED)
            return found;
    }
    return kernels(address, length, protection, flags, fd, offset);
}

PUBLIC void *mmap64(void *address, size_t length, int protection, int flags, int fd, off_t offset)
    __attribute__((alias("mmap")));
