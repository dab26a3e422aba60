# What libkda links. Read by the project itself and, when the library is static, by kdaConfig.cmake of an installation.
find_package(hwy REQUIRED)
find_package(simdjson REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(YAMLCPP REQUIRED IMPORTED_TARGET yaml-cpp)

# oneDNN by its library: Debian's package file for it also asks for OpenCL's headers, which nothing here needs.
if(NOT TARGET DNNL::dnnl)
  find_path(DNNL_INCLUDE dnnl.hpp REQUIRED)
  find_library(DNNL_LIBRARY dnnl REQUIRED)
  find_package(OpenMP REQUIRED COMPONENTS CXX)  # oneDNN's own runtime: we tell it to stay on the calling thread
  add_library(DNNL::dnnl UNKNOWN IMPORTED)
  set_target_properties(DNNL::dnnl PROPERTIES IMPORTED_LOCATION ${DNNL_LIBRARY}
                                              INTERFACE_INCLUDE_DIRECTORIES ${DNNL_INCLUDE}
                                              INTERFACE_LINK_LIBRARIES OpenMP::OpenMP_CXX)
endif()
