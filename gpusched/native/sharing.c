/* CUDA IPC: what does not work with memory of our making, said once; and how much of others is used here.
 *
 * A process that has memory of another one mapped is taken off the GPU by the driver and not brought back. Nothing
 * outside the process shows that; here it is counted.
 */
#define _GNU_SOURCE
#include "direct.h"

#include <string.h>
#include <unistd.h>

static size_t opened; /* by cuIpcOpenMemHandle */

void sharing_note(void) {
    control_note_imports(table.foreign + opened);
}

static void note_opened(int more) {
    table_lock();
    if (more > 0 || opened > 0)
        opened += (size_t)more;
    sharing_note();
    table_unlock();
}

static void say_once(const char *line) {
    static _Atomic bool said;
    if (!atomic_exchange(&said, true)) {
        ssize_t written = write(STDERR_FILENO, line, strlen(line));
        (void)written; /* nobody listens */
    }
}

CUresult ipc_get(void *handle, CUdeviceptr address) {
    CUresult result = driver.cuIpcGetMemHandle(handle, address);
    if (result == CUDA_SUCCESS)
        return result;
    table_lock();
    bool is_ours = memory_at(address) != NULL;
    table_unlock();
    if (is_ours)
        say_once("gpusched: CUDA IPC (cudaIpcGetMemHandle) does not work with memory that gpusched can move at the "
                 "speed of the bus. To share it, start the program with GPUSCHED_DIRECT=0 in its environment: the "
                 "driver then moves it, more slowly, and not while another process has it open.\n");
    return result;
}

CUresult ipc_open(CUdeviceptr *address, struct ipc_handle handle, unsigned flags) {
    CUresult result = driver.cuIpcOpenMemHandle(address, handle, flags);
    if (result == CUDA_SUCCESS)
        note_opened(1);
    return result;
}

CUresult ipc_close(CUdeviceptr address) {
    CUresult result = driver.cuIpcCloseMemHandle(address);
    if (result == CUDA_SUCCESS)
        note_opened(-1);
    return result;
}

void sharing_after_fork(void) {
    opened = 0;
}
