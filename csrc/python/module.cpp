// The module _C: what the torch library's kernels use on this machine. Nothing else depends on it:
// the operators live in that library, which knows no Python.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "ultramem/device_info.h"

namespace py = pybind11;

namespace {

// A function of the torch library, which must be loaded already.
template <typename Function>
Function lookup(const std::string& library_path, const char* name) {
  void* library = dlopen(library_path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) {
    throw std::runtime_error(library_path + " is not loaded; import ultramem_cuda first");
  }
  void* symbol = dlsym(library, name);
  dlclose(library);  // drops the reference that dlopen took; torch keeps the library loaded
  if (symbol == nullptr) throw std::runtime_error(library_path + " has no " + name);
  return reinterpret_cast<Function>(symbol);
}

py::list kernel_attributes(const std::string& library_path) {
  const auto count = lookup<int32_t (*)()>(library_path, "ultramem_kernel_count");
  const auto attributes = lookup<const char* (*)(int32_t, ultramem::KernelAttributes*)>(
      library_path, "ultramem_kernel_attributes");
  py::list kernels;
  for (int32_t index = 0; index < count(); ++index) {
    ultramem::KernelAttributes kernel{};
    const char* error = attributes(index, &kernel);
    if (error != nullptr) throw std::runtime_error(error);
    py::dict entry;
    entry["name"] = kernel.name;
    entry["registers_per_thread"] = kernel.registers_per_thread;
    entry["static_shared_bytes"] = kernel.static_shared_bytes;
    entry["max_dynamic_shared_bytes"] = kernel.max_dynamic_shared_bytes;
    entry["local_bytes_per_thread"] = kernel.local_bytes_per_thread;
    entry["max_threads_per_block"] = kernel.max_threads_per_block;
    entry["block_threads"] = kernel.block_threads;
    entry["active_blocks_per_multiprocessor"] = kernel.active_blocks_per_multiprocessor;
    entry["binary_version"] = kernel.binary_version;
    kernels.append(entry);
  }
  return kernels;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the CUDA kernels of ultramem_cuda use on this machine.";
  m.def("kernel_attributes", &kernel_attributes, py::arg("library_path"),
        "Registers, shared and local memory, and occupancy of every CUDA kernel on the current "
        "device. Raises RuntimeError without a GPU.");
}
