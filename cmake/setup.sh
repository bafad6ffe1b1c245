#!/usr/bin/env bash
# Installs what the build needs on Debian 12 (as root or through sudo). Does nothing when it is all there.
set -euo pipefail

packages=(
  build-essential ca-certificates ccache cmake git ninja-build pkg-config python3
  clang-22 clang-format-22 clang-tidy-22 libclang-rt-22-dev lld-22 llvm-22-dev llvm-22-tools
  libmlir-22-dev mlir-22-tools libzstd-dev zlib1g-dev libedit-dev libxml2-dev
  libbenchmark-dev libcli11-dev libdlpack-dev libfmt-dev libgmock-dev libgtest-dev libspdlog-dev libxxhash-dev
  nlohmann-json3-dev libopenblas0-pthread
)

# The tests' NVRTC comes as a wheel where no toolkit is installed: cmake/AttnjitNvrtc.cmake.
if ! compgen -G '/usr/local/cuda/lib64/libnvrtc.so.1[23]' >/dev/null && ! python3 -m pip --version >/dev/null 2>&1; then
  packages+=(python3-pip)
fi

missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ]; then
  as_root=()
elif command -v sudo >/dev/null; then
  as_root=(sudo)
else
  echo "setup: these packages are missing and need root or sudo to install: ${missing[*]}" >&2
  exit 2
fi
echo "setup: installing ${missing[*]}"
"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
