#!/bin/sh
# Runs Python on an emulated x86-64 processor with AVX-512, VNNI and BF16: tests/avx512.sh FOLDER DATA
# DATA, a folder with `main.py`, lies at /data there; what main.py prints comes out. qemu has no AVX-512, so it is Bochs,
# a whole machine: Debian's kernel, Python 3.11 and the wheels of numpy and both runtimes, on one CPU of 2 GiB.
# FOLDER is made on the first call, 1.5 GB in 5 minutes. Needs Debian 12, as root, for packages. It shows whether results
# are right, never how fast they come: a network of some GFLOP loads in minutes.
set -eu
checkout=$(cd "$(dirname "$0")/.." && pwd)
. "$checkout/tests/emulated.sh"
mkdir -p "$1"
folder=$(cd "$1" && pwd)
data=$(cd "$2" && pwd)
cd "$folder"
[ -e done ] || (
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends g++ make kmod cpio genisoimage isolinux syslinux-common busybox-static \
        vgabios > /dev/null
    rm -rf apt bochs root init iso wheels
    mkdir -p apt/lists/partial apt/cache/archives/partial bochs root init/bin iso/isolinux
    touch apt/status
    # From Debian 13: the emulator's source, of which the packaged program is built without AVX-512.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -1)
    for kind in deb deb-src; do
        echo "$kind [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main"
    done > apt/sources.list
    newer="-q -oDir::Etc::SourceList=$PWD/apt/sources.list -oDir::Etc::SourceParts=/dev/null -oDir::Cache=$PWD/apt/cache
        -oDir::State::Lists=$PWD/apt/lists -oDir::State::status=$PWD/apt/status -oAPT::Sandbox::User=root"
    apt-get $newer update
    (cd apt && apt-get $newer source --download-only bochs || true) # its .dsc may be missing, which nothing here needs
    (cd apt && apt-get $newer download bochsbios && dpkg -x bochsbios_*.deb bios)
    tar xf apt/bochs_*.orig.tar.xz --strip-components=1 -C bochs
    # 3.0 takes the fifth bit of a vector index for an operand, and refuses half of all gathers and scatters.
    sed -i 's/      i->setSibIndex(i->sibIndex() | (vvv & 0x10));/&\n      vvv \&= 0xf;/' bochs/cpu/decoder/fetchdecode32.cc
    (cd bochs && ./configure CXXFLAGS=-O2 CFLAGS=-O2 --enable-x86-64 --enable-cpu-level=6 --enable-avx --enable-evex \
        --enable-fast-function-calls --enable-repeat-speedups --enable-handlers-chaining --enable-pci --disable-docbook \
        --without-x --without-x11 --with-nogui --disable-plugins --disable-debugger && make -j2) > bochs.txt 2>&1
    apt="apt-get -q -oDir::State::status=$PWD/apt/status -oDir::Cache=$PWD/apt/cache -oAPT::Sandbox::User=root"
    kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)/\1/p' | head -1)
    (cd apt && $apt download "$kernel" && dpkg -x "$kernel"_*.deb kernel)
    python_and_wheels x86_64 root/site
    mkdir -p root/data root/proc root/sys root/dev root/tmp
    cp /bin/busybox init/bin
    cp /bin/busybox root/bin
    version=$(ls apt/kernel/lib/modules)
    /sbin/depmod -b apt/kernel "$version"
    for module in ata_piix sd_mod ext4 crc32c_generic; do
        /sbin/modprobe -d apt/kernel -S "$version" --show-depends $module
    done | awk '!seen[$2]++ { print $2 }' | while read -r file; do
        cp "$file" init && basename "$file"
    done > init.order
    mv init.order init/order
    cat > init/init << 'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /new
$b mount -t proc p /proc && $b mount -t sysfs s /sys && $b mount -t devtmpfs d /dev
while read -r file; do $b insmod "/$file"; done < /order
until [ -b /dev/sda ]; do $b sleep 0.2; done
$b mount -t ext4 -o ro /dev/sda /new
for each in proc sys dev; do $b mount --move /$each /new/$each; done
$b mount -t tmpfs t /new/tmp
cd /new/data && PYTHONPATH=/site HOME=/tmp $b chroot /new /bin/busybox sh -c \
    'cd /data; echo ready; /usr/bin/python3.11 -u -W ignore main.py; echo "ended with $?"; /bin/busybox poweroff -f'
INIT
    chmod +x init/init
    (cd init && find . | cpio -o -H newc --quiet | gzip -1) > iso/initrd.gz
    cp apt/kernel/boot/vmlinuz-* iso/vmlinuz
    cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 iso/isolinux
    # Feature 580, FSRM: the kernel takes it for a sign of fast copies, which Bochs does not report, and copies too much.
    printf 'DEFAULT l\nLABEL l\n KERNEL /vmlinuz\n APPEND initrd=/initrd.gz console=ttyS0 quiet mitigations=off %s\n' \
        'nokaslr no_watchdog clearcpuid=580' > iso/isolinux/isolinux.cfg
    genisoimage -quiet -o boot.iso -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 \
        -boot-info-table iso
    touch done
)
rm -rf root/data root/site/msa2net run disk.img*
cp -r "$data" root/data
mkdir run root/site/msa2net
git -C "$checkout" ls-files '*.py' '*.json' | (cd "$checkout" && cpio -pdm --quiet "$folder/root/site/msa2net")
block=516096 # Bochs wants whole cylinders
truncate -s $((($(du -sm root | cut -f1) * 5 / 4 + 64) * 1048576 / block * block)) disk.img
/sbin/mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -d root disk.img
cat > run/bochsrc << EOF
memory: guest=2048, host=2048
cpu: model=sapphire_rapids, ips=100000000, ignore_bad_msrs=1, exclude_features="avx512fp16,uintr,cet,la57,pks,waitpkg,mwait"
romimage: file=apt/bios/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path=disk.img
ata0-slave: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=run/output
log: run/log
error: action=ignore
info: action=ignore
display_library: nogui
EOF
bochs/bochs -q -f run/bochsrc > run/screen 2>&1 < /dev/null || true # its way to power off is to fail
sed -n '1,/ready/d; s/\r$//; p' run/output | grep -v '^\[' | sed '/^ended with/q'
grep -q '^ended with 0' run/output
