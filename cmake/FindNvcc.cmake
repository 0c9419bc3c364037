# Points CMake's own search for the CUDA compiler at the toolkit of CUDA_HOME or CUDA_PATH, where
# CUDACXX is unset and nvcc is not on PATH.
function(ultramem_find_nvcc)
  # check_language keeps its "not found" in the cache: an nvcc that came later must be seen.
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
  if(NOT "$ENV{CUDACXX}" STREQUAL "" OR CMAKE_CUDA_COMPILER)
    return()
  endif()
  find_program(nvcc nvcc PATHS ENV PATH NO_DEFAULT_PATH NO_CACHE)
  if(nvcc)
    return()
  endif()
  foreach(variable IN ITEMS CUDA_HOME CUDA_PATH)
    if(NOT "$ENV{${variable}}" STREQUAL "" AND EXISTS "$ENV{${variable}}/bin/nvcc")
      # check_language and enable_language read it.
      set(ENV{CUDACXX} "$ENV{${variable}}/bin/nvcc")
      return()
    endif()
  endforeach()
endfunction()
