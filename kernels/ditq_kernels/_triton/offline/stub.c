/* The functions of libcuda that Triton calls, without a GPU: all succeed, nothing runs. */
#include <string.h>

typedef int CUresult;
static long context = 1;
int shared_limit = 232448; /* bytes a program may ask for; whoever loads this sets it */
#define DONE return 0

CUresult cuInit(unsigned flags) { DONE; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; DONE; }
CUresult cuGetErrorString(int error, const char **text) { *text = "stub"; DONE; }
CUresult cuCtxGetDevice(int *device) { *device = 0; DONE; }
CUresult cuCtxGetCurrent(void **c) { *c = &context; DONE; }
CUresult cuCtxSetCurrent(void *c) { DONE; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; DONE; }
CUresult cuCtxSetLimit(int limit, size_t value) { DONE; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = 0; DONE; }
CUresult cuDevicePrimaryCtxRetain(void **c, int device) { *c = &context; DONE; }
/* 97: shared memory a program may ask for; 8: without asking; the rest are counts */
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 97 ? shared_limit : attribute == 8 ? 49152 : 132;
  DONE;
}
CUresult cuModuleLoadData(void **module, const void *image) { *module = &context; DONE; }
CUresult cuModuleUnload(void *module) { DONE; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = &context; DONE; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; DONE; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { DONE; }
CUresult cuFuncSetCacheConfig(void *function, int config) { DONE; }
/* a pointer into ordinary memory is taken for one of a GPU */
CUresult cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
  *(unsigned long long *)data = pointer;
  DONE;
}
CUresult cuPointerGetAttributes(unsigned count, int *attributes, void **data, unsigned long long pointer) { DONE; }
CUresult cuStreamIsCapturing(void *stream, int *status) { *status = 0; DONE; }
CUresult cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { DONE; }
CUresult cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; DONE; }
CUresult cuTensorMapEncodeTiled(void *map, ...) { memset(map, 0, 128); DONE; }
CUresult cuTensorMapEncodeIm2col(void *map, ...) { memset(map, 0, 128); DONE; }
