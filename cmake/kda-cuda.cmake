# What the CUDA backend links. The runtime is linked statically, so that a program starts where no driver is; cuBLASLt is
# found in the toolkit or in NVIDIA's Python package (nvidia/*/lib) and stays a shared library. Read by the project
# itself and, when the library is static, by kdaConfig.cmake of an installation.
find_package(CUDAToolkit 12.8 REQUIRED)
find_package(Python3 QUIET COMPONENTS Interpreter)
set(KDA_CUDA_PYTHON "" CACHE PATH "site-packages folder whose nvidia/ holds cuBLAS, where the toolkit does not")
set(kda_cuda_roots ${CUDAToolkit_LIBRARY_ROOT} ${CUDAToolkit_TARGET_DIR})
foreach(site ${KDA_CUDA_PYTHON} ${Python3_SITELIB})
  file(GLOB found ${site}/nvidia/*)
  list(APPEND kda_cuda_roots ${found})
endforeach()

function(kda_cuda_library target header package)
  if(TARGET ${target})
    return()
  endif()
  find_path(${target}_INCLUDE ${header} HINTS ${CUDAToolkit_INCLUDE_DIRS} ${kda_cuda_roots} PATH_SUFFIXES include)
  find_library(${target}_LIBRARY NAMES ${ARGN} HINTS ${CUDAToolkit_LIBRARY_DIR} ${kda_cuda_roots}
               PATH_SUFFIXES lib lib64 targets/x86_64-linux/lib)
  mark_as_advanced(${target}_INCLUDE ${target}_LIBRARY)
  if(NOT ${target}_INCLUDE OR NOT ${target}_LIBRARY)
    message(FATAL_ERROR "KDA_CUDA=ON needs ${header} and its library (${ARGN}): neither the CUDA toolkit at "
                        "${CUDAToolkit_TARGET_DIR} nor the Python packages of ${Python3_EXECUTABLE} hold both. Install "
                        "them with the toolkit, or as the Python package ${package} with "
                        "-DKDA_CUDA_PYTHON=its site-packages folder. -DKDA_CUDA=OFF builds without CUDA.")
  endif()
  add_library(${target} UNKNOWN IMPORTED)
  set_target_properties(${target} PROPERTIES IMPORTED_LOCATION "${${target}_LIBRARY}")
  target_include_directories(${target} SYSTEM INTERFACE "${${target}_INCLUDE}")
endfunction()

kda_cuda_library(kda_cublaslt cublasLt.h nvidia-cublas cublasLt libcublasLt.so.13 libcublasLt.so.12)
