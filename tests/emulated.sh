# For arm.sh and avx512.sh, which source it.

# Debian's Python 3.11, by the apt-get command in $apt, into root/; wheels of numpy and both runtimes for a machine into a folder.
python_and_wheels() { # MACHINE FOLDER
    $apt --download-only --no-install-recommends -y install python3.11-minimal python3.11 libpython3.11-stdlib \
        libstdc++6 libgomp1 zlib1g
    for package in apt/cache/archives/*.deb; do dpkg -x "$package" root; done
    platforms=
    for tag in manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
        platforms="$platforms --platform ${tag}_$1"
    done
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 --implementation cp $platforms \
        -d wheels numpy onnxruntime openvino pillow flatbuffers protobuf packaging
    for wheel in wheels/*.whl; do python3 -m zipfile -e "$wheel" "$2"; done
}
