# The versions, each from the one place where it stands.

# The package's, from ultramem_cuda/_version.py.
function(ultramem_package_version out)
  set(source "${CMAKE_CURRENT_SOURCE_DIR}/ultramem_cuda/_version.py")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${source}")
  file(STRINGS "${source}" line REGEX "^__version__ = ")
  if(NOT line MATCHES "\"([0-9]+\\.[0-9]+\\.[0-9]+[^\"]*)\"")
    message(FATAL_ERROR "ultramem_cuda/_version.py: cannot read the version from '${line}'")
  endif()
  set(${out} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# The C++ API's, from csrc/include/ultramem/version.h.
function(ultramem_api_version out)
  set(source "${CMAKE_CURRENT_SOURCE_DIR}/csrc/include/ultramem/version.h")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${source}")
  file(STRINGS "${source}" line REGEX "^#define ULTRAMEM_API_VERSION ")
  if(NOT line MATCHES "ULTRAMEM_API_VERSION ([0-9]+)$")
    message(FATAL_ERROR "version.h: cannot read ULTRAMEM_API_VERSION from '${line}'")
  endif()
  set(${out} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()
