/* The control thread: does what the daemon asks, one request after the other.
 *
 * The daemon finds this process by the name of a memory file among its descriptors, reads from that file which
 * descriptor is its end of a socket pair, and takes that over (pidfd_getfd). So there is no path, no name and no
 * listening socket that another user could reach; who may take the descriptor is who may trace this process.
 *
 * Whoever asks may die at any moment and another may come. So each request is answered at once, with what is true
 * then, and can be asked again.
 */
#define _GNU_SOURCE
#include "direct.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAGE_NAME "gpusched-direct"
enum { MAGIC = 0x47534431, VERSION = 1, BATCH = 64 };

/* The phases of a process; the daemon knows the same numbers. */
enum phase { RUNNING, CLOSED, PARKED };
enum operation { STATE, CLOSE, OPEN, LIST, EXPORT, HELD, PARK, DROP, CREATE, ATTACH, MAP };

/* What the daemon can read at any moment, also of a stopped process. It writes `cancel` and `absorbed`. */
struct page {
    uint32_t magic, version;
    uint32_t daemon_end, own_end; /* descriptors */
    _Atomic uint32_t phase;
    _Atomic uint32_t cancel; /* whoever asked for CLOSE has given up */
    uint64_t shelter, shelter_size; /* addresses of our own, where the contents may be put while they are parked */
    _Atomic uint32_t absorbed;      /* that is where they are */
    _Atomic uint32_t imports;       /* pieces of other processes' memory that are used here */
};

struct request {
    uint32_t magic, sequence, operation, argument;
    uint64_t first; /* place in the table */
};
/* Of EXPORT: whether the descriptors stay here too until DROP, or only go out. */
enum keeping { KEEP, PASS };

struct item {
    uint64_t place, address, size;
    uint8_t gpu[16]; /* its UUID */
};

struct reply {
    uint32_t magic, sequence;
    int32_t status;   /* a CUresult, or minus an errno */
    uint32_t count;   /* items */
    uint32_t phase;
    uint32_t reserved;
    uint64_t next;    /* place to go on from; the table's end: its size */
    uint64_t total;   /* places in the table */
    struct item items[BATCH];
};

static struct page *page;
static int page_fd = -1, own_end = -1, daemon_end = -1;
static _Atomic bool started;

static void set_phase(enum phase phase) {
    atomic_store(&page->phase, (uint32_t)phase);
}

void control_note_imports(size_t count) {
    if (page != NULL)
        atomic_store(&page->imports, (uint32_t)count);
}

/* -- the requests -------------------------------------------------------------------------------------------------- */

static void tell_of(struct reply *reply, size_t place) {
    const struct memory *memory = &table.items[place];
    struct item *item = &reply->items[reply->count++];
    *item = (struct item){.place = place, .address = memory->address, .size = memory->size};
    memcpy(item->gpu, memory->gpu, sizeof item->gpu);
}

/* Does `work` for the entries from `first` on until the reply is full, or until one fails. */
static CUresult each(struct reply *reply, uint64_t first, CUresult (*work)(struct memory *), int *fds) {
    size_t place = first;
    CUresult result = CUDA_SUCCESS;
    for (; place < table.count && reply->count < BATCH && result == CUDA_SUCCESS; place++) {
        struct memory *memory = &table.items[place];
        if (!memory_is_movable(memory))
            continue;
        if (work != NULL)
            result = driver.cuCtxSetCurrent(memory_context(memory));
        if (work != NULL && result == CUDA_SUCCESS)
            result = work(memory);
        if (result != CUDA_SUCCESS)
            break;
        if (fds != NULL)
            fds[reply->count] = memory->fd;
        tell_of(reply, place);
    }
    reply->next = place;
    return result;
}

static CUresult for_all(CUresult (*work)(struct memory *)) {
    CUresult result = CUDA_SUCCESS;
    for (size_t i = 0; i < table.count && result == CUDA_SUCCESS; i++)
        if (memory_is_movable(&table.items[i])) {
            result = driver.cuCtxSetCurrent(memory_context(&table.items[i]));
            if (result == CUDA_SUCCESS)
                result = work(&table.items[i]);
        }
    return result;
}

/* Of those that `each` has told of: what is on its way to the daemon holds the memory by itself. */
static void drop_told(const struct reply *reply) {
    for (uint32_t i = 0; i < reply->count; i++)
        memory_drop_fd(&table.items[reply->items[i].place]);
}

static CUresult let_go_of_all(void) {
    CUresult result = mappings_away();
    return result == CUDA_SUCCESS ? for_all(memory_release) : result;
}

/* Fresh memory, and a descriptor of it; not mapped yet. */
static CUresult create(struct memory *memory) {
    if (memory->handle)
        return memory_export(memory);
    memory_drop_fd(memory);
    CUresult result = memory_create(memory);
    return result == CUDA_SUCCESS ? memory_export(memory) : result;
}

static CUresult map(struct memory *memory) {
    if (!memory->handle)
        return CUDA_ERROR_INVALID_VALUE;
    if (memory->address == 0 || memory->mapped)
        return CUDA_SUCCESS;
    return memory_map(memory);
}

/* Room in our own memory, of which no page is there until somebody writes to it. What is here goes where we go: to
 * disk, and into copies. */
static bool make_shelter(void) {
    const size_t bytes = memory_movable_bytes();
    void *made = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED)
        return false;
    page->shelter = (uint64_t)(uintptr_t)made;
    page->shelter_size = bytes;
    return true;
}

static void leave_shelter(void) {
    if (page->shelter_size > 0)
        munmap((void *)(uintptr_t)page->shelter, page->shelter_size);
    page->shelter = page->shelter_size = 0;
    atomic_store(&page->absorbed, 0);
}

/* From our own memory, one piece after the other as they stand in the table. */
static const char *next_sheltered;
static CUresult fill(struct memory *memory) {
    CUresult result = memory_fill(memory, next_sheltered);
    next_sheltered += memory->size;
    return result;
}

static CUresult map_all(void) {
    CUresult result = for_all(map);
    return result == CUDA_SUCCESS ? mappings_back() : result;
}

static CUresult attach(bool from_shelter) {
    CUresult result = map_all();
    if (result == CUDA_SUCCESS && from_shelter) {
        next_sheltered = (const char *)(uintptr_t)page->shelter;
        result = for_all(fill);
    }
    if (result != CUDA_SUCCESS)
        return result;
    memory_drop_all();
    leave_shelter();
    set_phase(CLOSED);
    return CUDA_SUCCESS;
}

/* Not while a graph is captured: the wait that follows would spoil it. So those that have begun end first. */
static bool close_between_captures(unsigned timeout_ms) {
    bool closed = false;
    captures_hold(true);
    for (unsigned waited_ms = 0; !closed && waited_ms < timeout_ms && !atomic_load(&page->cancel); waited_ms++) {
        if (captures_are_on()) {
            nanosleep(&(struct timespec){.tv_nsec = 1000 * 1000}, NULL);
            continue;
        }
        if (!gate_close(timeout_ms - waited_ms))
            break;
        closed = !captures_are_on();
        if (!closed)
            gate_open();
    }
    captures_hold(false);
    return closed;
}

static CUresult close_gate(unsigned timeout_ms) {
    if (!close_between_captures(timeout_ms))
        return -ETIMEDOUT;
    CUresult result = contexts_synchronize();
    if (result != CUDA_SUCCESS || atomic_load(&page->cancel)) {
        gate_open();
        return result != CUDA_SUCCESS ? result : -ECANCELED;
    }
    set_phase(CLOSED);
    return CUDA_SUCCESS;
}

static CUresult perform(const struct request *request, struct reply *reply, int *fds) {
    const enum phase phase = atomic_load(&page->phase);
    CUresult result;
    switch ((enum operation)request->operation) {
    case STATE:
        return CUDA_SUCCESS;
    case LIST: /* also while the gate is open */
        table_lock();
        result = each(reply, request->first, NULL, NULL);
        table_unlock();
        return result;
    case CLOSE:
        return phase == RUNNING ? close_gate(request->argument) : CUDA_SUCCESS;
    case OPEN:
        if (phase == PARKED)
            return -EBUSY;
        memory_drop_all();
        set_phase(RUNNING);
        gate_open();
        return CUDA_SUCCESS;
    case EXPORT:
        if (phase != CLOSED)
            return -EBUSY;
        if (request->argument == KEEP)
            memory_raise_limit();
        return each(reply, request->first, memory_export, fds);
    case HELD: /* as DROP: without the driver */
        return each(reply, request->first, NULL, fds);
    case PARK:
        if (phase == RUNNING)
            return -EBUSY;
        if (phase == CLOSED && !make_shelter())
            return -ENOMEM;
        set_phase(PARKED); /* before the first goes: from here on the contents are not all in place */
        return let_go_of_all();
    case DROP:
        memory_drop_all(); /* asks nothing of the driver, which may have been told to stand still */
        return CUDA_SUCCESS;
    case CREATE:
        if (phase != PARKED)
            return -EBUSY;
        result = each(reply, request->first, create, fds);
        if (result != CUDA_SUCCESS) {
            reply->count = 0;
            memory_drop_all(); /* where not all of it fits, none of it stays */
            let_go_of_all();
        }
        return result;
    case ATTACH:
        if (phase != PARKED)
            return -EBUSY;
        return attach(request->argument != 0 && atomic_load(&page->absorbed));
    case MAP: /* the contents may be on their way; ATTACH says that they are there */
        return phase == PARKED ? map_all() : -EBUSY;
    }
    return -EINVAL;
}

/* -- the socket ---------------------------------------------------------------------------------------------------- */

static void answer(const struct reply *reply, const int *fds) {
    char ancillary[CMSG_SPACE(BATCH * sizeof(int))] = {0};
    struct iovec part = {(void *)reply, offsetof(struct reply, items) + reply->count * sizeof(struct item)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fds != NULL && reply->count > 0) {
        message.msg_control = ancillary;
        message.msg_controllen = CMSG_SPACE(reply->count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(reply->count * sizeof(int));
        memcpy(CMSG_DATA(header), fds, reply->count * sizeof(int));
    }
    while (sendmsg(own_end, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno == EINTR)
        ;
}

static void *serve(void *unused) {
    (void)unused;
    prctl(PR_SET_NAME, "gpusched-direct");
    gate_exempt();
    for (;;) {
        struct request request;
        ssize_t size = recv(own_end, &request, sizeof request, 0);
        if (size < 0 && errno == EINTR)
            continue;
        if (size <= 0)
            return NULL; /* somebody closed our descriptors: nobody can reach us any more */
        if (size != sizeof request || request.magic != MAGIC)
            continue;
        struct reply reply = {.magic = MAGIC, .sequence = request.sequence};
        int fds[BATCH];
        for (int i = 0; i < BATCH; i++)
            fds[i] = -1;
        reply.status = perform(&request, &reply, fds);
        reply.phase = atomic_load(&page->phase);
        reply.total = table.count;
        bool have_fds = reply.status == CUDA_SUCCESS;
        for (uint32_t i = 0; i < reply.count; i++)
            have_fds = have_fds && fds[i] >= 0;
        answer(&reply, have_fds ? fds : NULL);
        if (request.operation == CREATE || (request.operation == EXPORT && request.argument == PASS))
            drop_told(&reply);
    }
}

/* -- begin and end ------------------------------------------------------------------------------------------------- */

static bool open_page(void) {
    int ends[2];
    page_fd = memfd_create(PAGE_NAME, MFD_CLOEXEC);
    if (page_fd < 0)
        return false;
    if (ftruncate(page_fd, sizeof *page) != 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
        close(page_fd);
        return false;
    }
    page_fd = descriptor_move_up(page_fd);
    own_end = descriptor_move_up(ends[0]);
    daemon_end = descriptor_move_up(ends[1]);
    page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, page_fd, 0);
    if (page == MAP_FAILED)
        return false;
    *page = (struct page){.version = VERSION, .daemon_end = (uint32_t)daemon_end, .own_end = (uint32_t)own_end};
    return true;
}

void control_start(void) {
    bool before = false;
    if (!atomic_compare_exchange_strong(&started, &before, true))
        return;
    if (!open_page())
        return;
    sigset_t all, old;
    pthread_t thread;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* the program's signals are for its own threads */
    if (pthread_create(&thread, NULL, serve, NULL) == 0) {
        pthread_detach(thread);
        page->magic = MAGIC; /* last: from here on we can be found */
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void control_after_fork(void) {
    if (!atomic_load(&started))
        return;
    close(page_fd);
    close(own_end);
    close(daemon_end);
    if (page != NULL)
        munmap(page, sizeof *page);
    page = NULL;
    page_fd = own_end = daemon_end = -1;
    atomic_store(&started, false);
}
