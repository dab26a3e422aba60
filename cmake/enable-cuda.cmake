# The compiler and the flags of the CUDA backend. KDA_CUDA_ARCHS: "90a" is machine code, "80-virtual" PTX.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(KDA_NVCC nvcc HINTS ${CUDAToolkit_ROOT} ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT KDA_NVCC)
    message(FATAL_ERROR "KDA_CUDA=ON needs nvcc, the compiler of the CUDA toolkit (12.8 or later). It is neither on "
                        "PATH nor under /usr/local/cuda. Give -DCMAKE_CUDA_COMPILER=..., or -DKDA_CUDA=OFF.")
  endif()
  set(CMAKE_CUDA_COMPILER ${KDA_NVCC})
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # the targets are given below, in a spelling that old CMakes know too
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()
include(cmake/kda-cuda.cmake)

set(kda_cuda_flags)
foreach(arch ${KDA_CUDA_ARCHS})
  if(arch MATCHES "^([0-9]+[af]?)(-real)?$")
    list(APPEND kda_cuda_flags "-gencode=arch=compute_${CMAKE_MATCH_1},code=sm_${CMAKE_MATCH_1}")
  elseif(arch MATCHES "^([0-9]+)-virtual$")
    list(APPEND kda_cuda_flags "-gencode=arch=compute_${CMAKE_MATCH_1},code=compute_${CMAKE_MATCH_1}")
  else()
    message(FATAL_ERROR "KDA_CUDA_ARCHS: cannot read '${arch}' (like 90a, 80-real or 80-virtual)")
  endif()
endforeach()

function(kda_use_cuda target)
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:${kda_cuda_flags};-lineinfo;--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra,-Wshadow,-Wno-missing-field-initializers>")
  string(REPLACE ";" " " archs "${KDA_CUDA_ARCHS}")
  set_source_files_properties(src/kernels/cuda/backend.cu PROPERTIES COMPILE_DEFINITIONS "KDA_CUDA_ARCHS=\"${archs}\"")
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY None)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static kda_cublaslt)
endfunction()
