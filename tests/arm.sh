#!/bin/sh
# Runs Python on an emulated Arm processor: tests/arm.sh FOLDER -m msa2net verify BUNDLE
# FOLDER is made on the first call, 0.5 GB: Debian's Python 3.11 for arm64, and the wheels of numpy and both runtimes.
# Needs Debian with qemu-user-static and pip. It shows whether results are right, never how fast they come.
set -eu
checkout=$(cd "$(dirname "$0")/.." && pwd)
. "$checkout/tests/emulated.sh"
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
[ -e "$folder/done" ] || (
    cd "$folder"
    rm -rf apt root site wheels
    mkdir -p apt/lists/partial apt/cache/archives/partial root/proc site
    touch apt/status
    apt="apt-get -q -oAPT::Architecture=arm64 -oAPT::Architectures=arm64 -oDir::State::Lists=$PWD/apt/lists
        -oDir::State::status=$PWD/apt/status -oDir::Cache=$PWD/apt/cache"
    $apt update
    python_and_wheels aarch64 site
    ln -s "$checkout" site/msa2net
    # ONNX Runtime reads the processor from these; qemu shadows absolute paths with the folder given by -L.
    cpus=root/sys/devices/system/cpu
    for cpu in 0 1; do
        mkdir -p $cpus/cpu$cpu/topology
        echo $cpu > $cpus/cpu$cpu/topology/core_id
        echo 0 > $cpus/cpu$cpu/topology/physical_package_id
        echo 0-1 > $cpus/cpu$cpu/topology/core_siblings_list
        printf 'processor\t: %s\nFeatures\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm %s\n' \
            $cpu 'lrcpc dcpop asimddp'
        printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n'
    done > root/proc/cpuinfo
    for name in possible present online; do echo 0-1 > $cpus/$name; done
    touch done
)
PYTHONPATH=$folder/site exec qemu-aarch64-static -cpu cortex-a76 -L "$folder/root" "$folder/root/usr/bin/python3.11" "$@"
