// The module _C: what was built, and what its kernels use on this machine. Nothing else depends on
// it: the operators live in the torch library, which knows no Python.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "ultramem/device_info.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ULTRAMEM_VERSION;
  info["build_type"] = ULTRAMEM_BUILD_TYPE;
  info["cxx_compiler"] = ULTRAMEM_CXX_COMPILER;
  info["cuda_compiler"] = std::string(ULTRAMEM_CUDA_COMPILER).empty()
                              ? py::object(py::none())
                              : py::object(py::str(ULTRAMEM_CUDA_COMPILER));
  info["cuda_architectures"] = split(ULTRAMEM_CUDA_ARCHITECTURES);
  info["cpu_capabilities"] = split(ULTRAMEM_CPU_CAPABILITIES);
  info["api_version"] = ultramem::kApiVersion;
  return info;
}

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
  m.doc() = "What ultramem_cuda was built for, and what its kernels use on this machine.";
  m.def("build_info", &build_info,
        "Version, compilers, CUDA architectures and CPU instruction sets of this build.");
  m.def("kernel_attributes", &kernel_attributes, py::arg("library_path"),
        "Registers, shared and local memory, and occupancy of every CUDA kernel on the current "
        "device. Raises RuntimeError without a GPU.");
}
