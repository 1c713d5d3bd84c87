# A root that can be pivoted, as every device has one; then the engine.
/oci/busybox mkdir -p /oci/bin /mnt /proc /sys /dev
/oci/busybox --install -s /oci/bin
export PATH=/oci/bin
mount --bind / /mnt
cd /mnt
mount --move . /
exec chroot . /oci/bin/sh /oci/engine.sh
