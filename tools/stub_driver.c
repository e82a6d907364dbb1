// A CUDA driver that launches nothing and keeps the last things that it was asked to launch.
#include <stdint.h>

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
} Config;  // the start of CUlaunchConfig

enum { MOST = 4096, POINTERS = 3 };

typedef struct {
    uint64_t function, grid, threads, shared, maps, pointers[POINTERS];
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

// Of the tensor maps since the last launch: all that they say, but for where their tensors lie.
static uint64_t maps;
static void hash(const void *bytes, int size) {
    for (int n = 0; n < size; n++) maps = (maps ^ ((const uint8_t *)bytes)[n]) * 0x100000001b3;
}
int cuTensorMapEncodeTiled(uint64_t *map, int dtype, uint32_t rank, uint64_t address, const uint64_t *dims,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int promotion, int fill) {
    int flags[] = {dtype, rank, interleave, swizzle, promotion, fill};
    hash(flags, sizeof flags);
    hash(dims, 8 * rank);
    hash(strides, 8 * (rank - 1));
    hash(box, 4 * rank);
    hash(steps, 4 * rank);
    map[0] = address;
    return 0;
}

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **_) {
    Launch *x = &launches[count++ % MOST];
    *x = (Launch){(uint64_t)function, config->grid[0], config->block[0], config->shared, maps};
    maps = 0;
    for (int n = 0; n < POINTERS; n++) x->pointers[n] = *(uint64_t *)parameters[n];
    return 0;
}

int stub_count(void) { return count; }
const Launch *stub_launches(void) { return launches; }
