# cmake --install: the headers, both libraries, and what find_package(ultramem CONFIG) reads. Nothing
# in it names a path of this machine, so that the prefix may be moved.
include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/ultramem")
install(DIRECTORY csrc/include/ultramem DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DATADIR}/licenses/ultramem")

# Two export sets: who links one library needs neither the other's file nor its dependencies.
install(TARGETS ultramem EXPORT ultramem-static)
install(TARGETS ultramem_shared EXPORT ultramem-shared)
foreach(kind IN ITEMS static shared)
  install(
    EXPORT ultramem-${kind}
    NAMESPACE ultramem::
    FILE ultramem-${kind}-targets.cmake
    DESTINATION "${package_dir}")
endforeach()

configure_package_config_file(cmake/ultramemConfig.cmake.in ultramemConfig.cmake
                              INSTALL_DESTINATION "${package_dir}")
# Until 1.0 a minor version may change the interface.
write_basic_package_version_file(ultramemConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/ultramemConfig.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/ultramemConfigVersion.cmake"
        DESTINATION "${package_dir}")
