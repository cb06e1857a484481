// A CUDA driver (libcuda.so.1) without a GPU, for the real cuda.core: it loads any code, knows every kernel by its name
// alone, and hands each launch to the test that asked for them. What is missing here the bindings report by name.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

enum { SUCCESS = 0, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201 };

struct LaunchConfig {  // CUlaunchConfig
  uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  void* attributes;
  uint32_t num_attributes;
};
using OnLaunch = int (*)(const char* kernel, const uint32_t* grid, const uint32_t* block, void* stream, void** parameters);

static OnLaunch on_launch;
static int context;  // its address is the primary context
static thread_local void* current;

static int init(unsigned) { return SUCCESS; }
static int driver_version(int* version) { return *version = 13000, SUCCESS; }
static int device_count(int* count) { return *count = 1, SUCCESS; }
static int device_get(int* device, int ordinal) { return *device = ordinal, ordinal ? INVALID_DEVICE : SUCCESS; }
static int retain(void** primary, int) { return *primary = &context, SUCCESS; }
static int release(int) { return SUCCESS; }
static int set_current(void* wanted) { return current = wanted, SUCCESS; }
static int get_current(void** wanted) { return *wanted = current, SUCCESS; }

static int load(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  *library = &context;
  if (!current) return INVALID_CONTEXT;
  return memcmp(code, "\x7f" "ELF", 4) ? INVALID_IMAGE : SUCCESS;
}
static int unload(void*) { return SUCCESS; }
static int get_kernel(void** kernel, void*, const char* name) { return *kernel = strdup(name), SUCCESS; }

static int launch(const LaunchConfig* config, void* kernel, void** parameters, void**) {
  if (!current) return INVALID_CONTEXT;
  return on_launch(static_cast<char*>(kernel), config->grid, config->block, config->stream, parameters);
}
static int error_text(int, const char** text) { return *text = "an error of the fake driver", SUCCESS; }

extern "C" int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  static const std::map<std::string, void*> known = {
      {"cuInit", (void*)init},
      {"cuDriverGetVersion", (void*)driver_version},
      {"cuDeviceGetCount", (void*)device_count},
      {"cuDeviceGet", (void*)device_get},
      {"cuDevicePrimaryCtxRetain", (void*)retain},
      {"cuDevicePrimaryCtxRelease", (void*)release},
      {"cuCtxSetCurrent", (void*)set_current},
      {"cuCtxGetCurrent", (void*)get_current},
      {"cuLibraryLoadData", (void*)load},
      {"cuLibraryUnload", (void*)unload},
      {"cuLibraryGetKernel", (void*)get_kernel},
      {"cuLaunchKernelEx", (void*)launch},
      {"cuGetErrorName", (void*)error_text},
      {"cuGetErrorString", (void*)error_text},
      {"cuGetProcAddress", (void*)cuGetProcAddress_v2},
  };
  auto found = known.find(name);
  *function = found == known.end() ? nullptr : found->second;
  if (status) *status = 0;
  return SUCCESS;
}

extern "C" void fake_driver_on_launch(OnLaunch callback) { on_launch = callback; }
