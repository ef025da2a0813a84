/* A stand-in for libcuda.so.1 and libnvidia-ml.so.1: host memory for device memory, the host's clock for events.
 *
 * It lets the code that calls the driver run where there is no GPU. Work is what `replay_enqueue` is given: it runs at
 * once, or is kept while the stream is captured and runs when the graph is launched. Environment variables make it fail:
 *
 *   REPLAY_GPU_COUNT         devices, default 1
 *   REPLAY_GPU_MEMORY        bytes of device memory, default 1 GiB
 *   REPLAY_GPU_FAULT=1       every synchronisation reports an illegal address
 *   REPLAY_NVML=0            NVML does not start
 *   REPLAY_NVML_REASONS      bits of the clock event reasons
 *   REPLAY_NVML_TEMPERATURE  degrees Celsius
 *   REPLAY_NVML_PROCESSES    computing processes
 *   REPLAY_NVML_CLOCK_STEP   MHz by which the clock rises with every reading
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int (*work_t)(void);
typedef struct { double ms; } event_t;
typedef struct { work_t work[64]; int count; } graph_t;

static int initialised, context, current;
static graph_t *capturing;
static size_t allocated;

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

int cuInit(unsigned flags) {
    initialised = setting("REPLAY_GPU_COUNT", 1) > 0;
    return flags ? 1 : initialised ? 0 : 100;
}
int replay_usable(void) { return initialised && context && current; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = (int)setting("REPLAY_GPU_COUNT", 1); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, (size_t)length, "Replayed GPU %d", device);
    return 0;
}
int cuDeviceGetPCIBusId(char *name, int length, int device) {
    snprintf(name, (size_t)length, "0000:%02x:00.0", device + 1);
    return 0;
}
int cuDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 75 ? 8 : which == 76 ? 6 : which == 16 ? 4 : -1;
    return device < 0 || *value < 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = (size_t)setting("REPLAY_GPU_MEMORY", 1L << 30);
    return device < 0;
}
int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) { return device < 0 || flags != 1; }
int cuDevicePrimaryCtxRetain(void **handle, int device) { context = 1; *handle = &context; return device < 0; }
int cuCtxSetCurrent(void *handle) { current = handle == &context; return !current; }

int cuMemAlloc_v2(uint64_t *address, size_t size) {
    if (!replay_usable()) return 201;
    if (allocated + size > (size_t)setting("REPLAY_GPU_MEMORY", 1L << 30)) return 2;
    void *memory = malloc(size);
    allocated += malloc_usable_size(memory);
    *address = (uint64_t)(uintptr_t)memory;
    return 0;
}
int cuMemFree_v2(uint64_t address) {
    allocated -= malloc_usable_size((void *)(uintptr_t)address);
    free((void *)(uintptr_t)address);
    return 0;
}
size_t replay_allocated(void) { return allocated; }
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) { memcpy((void *)(uintptr_t)to, from, size); return 0; }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) { memcpy(to, (void *)(uintptr_t)from, size); return 0; }

int cuStreamCreate(void **stream, unsigned flags) { *stream = malloc(1); return flags != 1; }
int cuStreamSynchronize(void *stream) { return !stream ? 1 : setting("REPLAY_GPU_FAULT", 0) ? 700 : 0; }
int cuEventCreate(event_t **event, unsigned flags) { *event = calloc(1, sizeof(event_t)); return flags != 0; }
int cuEventRecord(event_t *event, void *stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->ms = 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
    return !stream;
}
int cuEventSynchronize(event_t *event) { return !event ? 1 : setting("REPLAY_GPU_FAULT", 0) ? 700 : 0; }
int cuEventElapsedTime(float *ms, event_t *before, event_t *after) {
    *ms = (float)(after->ms - before->ms);
    return 0;
}

int replay_enqueue(work_t work) {
    if (capturing) {
        if (capturing->count == 64) return 1;
        capturing->work[capturing->count++] = work;
        return 0;
    }
    return work();
}
int cuStreamBeginCapture_v2(void *stream, int mode) {
    capturing = calloc(1, sizeof(graph_t));
    return !stream || mode != 2;
}
int cuStreamEndCapture(void *stream, graph_t **graph) { *graph = capturing; capturing = NULL; return !stream; }
int cuGraphInstantiateWithFlags(graph_t **executable, graph_t *graph, uint64_t flags) {
    *executable = malloc(sizeof(graph_t));
    **executable = *graph;
    return flags != 0 || graph->count == 0;
}
int cuGraphLaunch(graph_t *executable, void *stream) {
    for (int each = 0; each < executable->count; each++)
        if (executable->work[each]()) return 719;
    return !stream;
}
int cuGraphExecDestroy(graph_t *executable) { free(executable); return 0; }
int cuGraphDestroy(graph_t *graph) { free(graph); return 0; }
int cuGetErrorString(int code, const char **text) {
    *text = code == 100 ? "no CUDA-capable device is detected" : code == 700 ? "an illegal memory access was encountered" : "unspecified";
    return 0;
}

/* NVML */
typedef struct { unsigned pid; unsigned long long memory; unsigned instance, compute; } process_t;

int nvmlInitWithFlags(unsigned flags) { return flags || !setting("REPLAY_NVML", 1) ? 9 : 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
    *device = &initialised;
    return strncmp(bus, "0000:", 5) != 0 ? 6 : 0;
}
int nvmlDeviceGetClockInfo(void *device, int which, unsigned *mhz) {
    static unsigned readings;
    *mhz = (which == 1 ? 1500u : 7000u) + readings * (unsigned)setting("REPLAY_NVML_CLOCK_STEP", 0);
    readings++;
    return !device;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    *celsius = (unsigned)setting("REPLAY_NVML_TEMPERATURE", 45);
    return !device || sensor;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatt) { *milliwatt = 60500; return !device; }
int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *milliwatt) { *milliwatt = 170000; return !device; }
int nvmlDeviceGetPerformanceState(void *device, unsigned *state) { *state = 2; return device ? 3 : 1; /* not supported */ }
int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *bits) {
    *bits = (unsigned long long)setting("REPLAY_NVML_REASONS", 0);
    return !device;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_t *found) {
    unsigned there = (unsigned)setting("REPLAY_NVML_PROCESSES", 1);
    if (*count < there) { *count = there; return 7; }
    for (unsigned each = 0; found && each < there; each++) found[each].pid = 1000 + each;
    *count = there;
    return !device;
}
