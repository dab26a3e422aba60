# cmake -DBUILD=.. -DSOURCE=.. -DCONFIG=.. -DCOMPILER=.. -P install_test.cmake
# Installs the build into a fresh prefix, builds examples/ against that prefix alone, and runs what came out.
cmake_minimum_required(VERSION 3.24)
set(work ${BUILD}/install_test)
set(prefix ${work}/prefix)
file(REMOVE_RECURSE ${work})

function(run name)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE errors)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${name}: status ${status}\n${output}\n${errors}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

run("install" ${CMAKE_COMMAND} --install ${BUILD} --prefix ${prefix} --config "${CONFIG}")

# No header of the installation may reach outside it, and none of a backend or of the program belongs there.
file(GLOB_RECURSE headers RELATIVE ${prefix}/include/kda ${prefix}/include/kda/*.h)
if(NOT "runtime/engine.h" IN_LIST headers)
  message(FATAL_ERROR "include/kda/runtime/engine.h was not installed; headers: ${headers}")
endif()
foreach(header ${headers})
  if(header MATCHES "^cli/|^kernels/(cpu|cuda)/")
    message(FATAL_ERROR "${header} should not be installed")
  endif()
  file(STRINGS ${prefix}/include/kda/${header} includes REGEX "^#include \"")
  foreach(line ${includes})
    string(REGEX REPLACE "^#include \"([^\"]*)\".*" "\\1" wanted "${line}")
    if(NOT EXISTS ${prefix}/include/kda/${wanted})
      message(FATAL_ERROR "installed ${header} includes ${wanted}, which is not installed")
    endif()
  endforeach()
endforeach()

run("configure examples" ${CMAKE_COMMAND} -S ${SOURCE}/examples -B ${work}/examples -G Ninja
    -DCMAKE_BUILD_TYPE=${CONFIG} -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_PREFIX_PATH=${prefix})
run("build examples" ${CMAKE_COMMAND} --build ${work}/examples)

file(STRINGS ${SOURCE}/examples/generate.cc lines)
list(LENGTH lines count)
if(count GREATER_EQUAL 30)
  message(FATAL_ERROR "examples/generate.cc has ${count} lines, and should show how few are needed")
endif()

# The example and the installed program agree on the text.
set(prompt "The ls command lists")
run("example" ${work}/examples/generate ${SOURCE}/assets/nano-teacher ${prompt})
set(from_library "${output}")
run("program" ${prefix}/bin/kda generate -m ${SOURCE}/assets/nano-teacher -p ${prompt} -n 32)
if(NOT from_library STREQUAL output OR from_library STREQUAL "")
  message(FATAL_ERROR "the example wrote\n${from_library}\nand the program\n${output}")
endif()
