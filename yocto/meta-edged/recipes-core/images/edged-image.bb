SUMMARY = "A device whose init is edged, and little else"
LICENSE = "Apache-2.0"
inherit core-image

IMAGE_INSTALL = "base-files base-passwd kernel-modules edged"
IMAGE_FEATURES = "read-only-rootfs"
IMAGE_LINGUAS = ""
IMAGE_FSTYPES = "ext4 wic.bmap"
# The data partition is made by the device on its first boot.
APPEND += "edged.data=/dev/disk/by-partlabel/edged-data edged.watchdog=60"
