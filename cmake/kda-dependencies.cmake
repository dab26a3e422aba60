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

# Apache Arrow, when it is there: stored teachers in Parquet are then read (train/stored_parquet.cc). By its own CMake
# package, else by its libraries (a Python package of it, with CMAKE_PREFIX_PATH at its folder, has no such package).
find_package(Arrow QUIET CONFIG)
find_package(Parquet QUIET CONFIG)
if(NOT TARGET kda_arrow)
  if(TARGET Arrow::arrow_shared AND TARGET Parquet::parquet_shared)
    add_library(kda_arrow INTERFACE IMPORTED)
    target_link_libraries(kda_arrow INTERFACE Arrow::arrow_shared Parquet::parquet_shared)
  else()
    find_path(ARROW_INCLUDE parquet/arrow/reader.h)
    find_library(ARROW_LIBRARY arrow PATH_SUFFIXES . lib)
    find_library(PARQUET_LIBRARY parquet PATH_SUFFIXES . lib)
    mark_as_advanced(ARROW_INCLUDE ARROW_LIBRARY PARQUET_LIBRARY)
    if(ARROW_INCLUDE AND ARROW_LIBRARY AND PARQUET_LIBRARY)
      add_library(kda_arrow INTERFACE IMPORTED)
      target_include_directories(kda_arrow SYSTEM INTERFACE ${ARROW_INCLUDE})
      target_link_libraries(kda_arrow INTERFACE ${PARQUET_LIBRARY} ${ARROW_LIBRARY})
    endif()
  endif()
endif()
