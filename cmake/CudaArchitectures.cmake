# Which GPU code the library carries, in CMake's notation, from the variables people already use:
# CMAKE_CUDA_ARCHITECTURES (CMake's variable, or an environment variable of that name), CUDAARCHS
# (CMake's environment variable), or TORCH_CUDA_ARCH_LIST (torch's environment variable, e.g.
# "8.0;9.0a+PTX"). The first that is set counts.
#
# Default: machine code for sm_80 and sm_90a, and PTX of compute_80 for everything later
# (compute_90a PTX is not forward-compatible).
function(ultramem_cuda_architectures out)
  if(DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(${out} "${CMAKE_CUDA_ARCHITECTURES}" PARENT_SCOPE)
    return()
  endif()
  foreach(variable IN ITEMS CMAKE_CUDA_ARCHITECTURES CUDAARCHS)
    if(NOT "$ENV{${variable}}" STREQUAL "")
      set(${out} "$ENV{${variable}}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    string(REGEX REPLACE "[ ,]+" ";" requested "$ENV{TORCH_CUDA_ARCH_LIST}")
    set(architectures "")
    foreach(entry IN LISTS requested)
      if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
        message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: cannot read '${entry}'; write e.g. 8.0;9.0a+PTX")
      endif()
      set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
      if(CMAKE_MATCH_4)
        list(APPEND architectures "${number}")
      else()
        list(APPEND architectures "${number}-real")
      endif()
    endforeach()
    set(${out} "${architectures}" PARENT_SCOPE)
    return()
  endif()
  set(${out} "80;90a-real" PARENT_SCOPE)
endfunction()
