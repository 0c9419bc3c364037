// The version of this API, which is part of the name of every type, and so of every function that
// takes one: a program that was compiled with the headers of another version does not link.
#pragma once

// Raised by one whenever a struct of these headers changes its layout, or a struct or function its
// meaning. New functions, structs and enumerators do not raise it. docs/cpp.md has the whole
// policy. Also the number in the shared library's soname.
#define ULTRAMEM_API_VERSION 6

#define ULTRAMEM_API_NAME_PASTED(version) api##version
#define ULTRAMEM_API_NAME(version) ULTRAMEM_API_NAME_PASTED(version)
// The inline namespace that the types lie in: ultramem::api6. Programs write ultramem::.
#define ULTRAMEM_API ULTRAMEM_API_NAME(ULTRAMEM_API_VERSION)

// On the namespaces of the functions that the shared library exports; nothing else is exported.
#define ULTRAMEM_PUBLIC __attribute__((visibility("default")))

namespace ultramem {
inline namespace ULTRAMEM_API {

inline constexpr int kApiVersion = ULTRAMEM_API_VERSION;

}  // namespace ULTRAMEM_API
}  // namespace ultramem
