# cmake --install BUILD --prefix P: bin/kda, lib/libkda.*, include/kda/FOLDER/*.h, lib/cmake/kda (find_package(kda)).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(KDA_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/kda)

install(TARGETS kda_lib EXPORT kdaTargets)
if(TARGET kda)
  install(TARGETS kda)
  set_target_properties(kda PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)  # cuBLASLt where it was found
  if(BUILD_SHARED_LIBS)
    set_target_properties(kda PROPERTIES INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")
  endif()
endif()
# Headers include one another as "base/error.h", so include/kda is on the include path: #include "runtime/engine.h".
install(DIRECTORY src/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kda FILES_MATCHING PATTERN "*.h"
        PATTERN "cli" EXCLUDE PATTERN "kernels/cpu" EXCLUDE PATTERN "kernels/cuda" EXCLUDE)
install(EXPORT kdaTargets NAMESPACE kda:: DESTINATION ${KDA_PACKAGE_DIR})
configure_package_config_file(cmake/kdaConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/kdaConfig.cmake
                              INSTALL_DESTINATION ${KDA_PACKAGE_DIR})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/kdaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kdaConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/kdaConfigVersion.cmake
              cmake/kda-dependencies.cmake cmake/kda-cuda.cmake DESTINATION ${KDA_PACKAGE_DIR})
