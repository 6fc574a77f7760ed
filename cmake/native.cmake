# What the extension and the native tests build alike: DIPNET_SOURCES, all C++ but the bindings,
# and DIPNET_LIBRARIES and DIPNET_DEFINITIONS for whatever is made of them.
list(APPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_LIST_DIR}")
find_package(Threads REQUIRED)
option(DIPNET_IO_URING "Read with io_uring where liburing is found" ON)

set(DIPNET_CSRC "${CMAKE_CURRENT_LIST_DIR}/../src/dipnet/csrc")
file(GLOB DIPNET_SOURCES CONFIGURE_DEPENDS "${DIPNET_CSRC}/*.cpp")
list(FILTER DIPNET_SOURCES EXCLUDE REGEX "/(bind_[a-z]+|module)\\.cpp$")
set(DIPNET_LIBRARIES Threads::Threads)
set(DIPNET_DEFINITIONS)

if(DIPNET_IO_URING)
  find_package(liburing MODULE QUIET)
endif()
if(DIPNET_IO_URING AND liburing_FOUND)
  message(STATUS "Reading the disk with io_uring: ${liburing_LIBRARY}")
  list(APPEND DIPNET_LIBRARIES liburing::liburing)
  list(APPEND DIPNET_DEFINITIONS DIPNET_IO_URING)
else()
  message(STATUS "Reading the disk with threads: liburing is not found or not wanted")
  list(FILTER DIPNET_SOURCES EXCLUDE REGEX "/reader_uring\\.cpp$")
endif()
