# A CMake toolchain file: builds for arm64 Linux on another machine, with Debian's cross compiler
# (gcc-aarch64-linux-gnu, libc6-dev-arm64-cross); qemu-user runs what it makes.
#
#     cmake -S . -B build/arm64 -DCMAKE_TOOLCHAIN_FILE=tests/arm64.cmake
#     cmake --build build/arm64 --target llama kernels
#     qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm64/kernels --quick
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
