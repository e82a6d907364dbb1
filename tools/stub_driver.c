// A CUDA driver that launches nothing and keeps the last things that it was asked to launch.
#include <stdint.h>

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
} Config;  // the start of CUlaunchConfig

enum { MOST = 4096, POINTERS = 3 };

typedef struct {
    uint64_t function, grid, threads, shared, pointers[POINTERS];
} Launch;

static Launch launches[MOST];
static int count;
static char context;

int cuCtxGetCurrent(void **found) { *found = &context; return 0; }
int cuCtxSetCurrent(void *_) { return 0; }
int cuDeviceGet(int *found, int _) { *found = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **found, int _) { *found = &context; return 0; }
int cuGetErrorString(int _, const char **found) { *found = "stub"; return 0; }
int cuFuncSetAttribute(void *_, int attribute, int value) { return 0; }
int cuPointerGetAttribute(uint64_t *found, int _, uint64_t pointer) { *found = pointer; return 0; }

int cuDriverGetVersion(int *found) { *found = 13000; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **_) {
    Launch *x = &launches[count++ % MOST];
    *x = (Launch){(uint64_t)function, config->grid[0], config->block[0], config->shared};
    for (int n = 0; n < POINTERS; n++) x->pointers[n] = *(uint64_t *)parameters[n];
    return 0;
}

int stub_count(void) { return count; }
const Launch *stub_launches(void) { return launches; }
