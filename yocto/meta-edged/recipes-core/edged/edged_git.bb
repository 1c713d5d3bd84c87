SUMMARY = "Container supervisor that boots as PID 1 on edge devices"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/Apache-2.0;md5=89aea4e17d99a7cacdbeed46a0096b10"

# The checkout this layer lies in. For a build from a release, set SRC_URI and SRCREV to it.
inherit externalsrc cargo cargo-update-recipe-crates
EXTERNALSRC = "${@os.path.abspath(os.path.join(d.getVar('FILE_DIRNAME'), '../../../..'))}"
EXTERNALSRC_BUILD = "${WORKDIR}/build"

# Edition 2024 needs Rust 1.85; scarthgap brings an older one, so a newer toolchain layer is needed there.
CARGO_BUILD_FLAGS += "--package edged --bin edged"
# Crates are fetched by cargo itself until a crates.inc is generated (bitbake -c update_crates edged).
do_compile[network] = "1"

do_install() {
    install -d ${D}${bindir} ${D}${sysconfdir}/edged ${D}${sysconfdir}/modules-load.d
    install -m 0755 ${B}/target/${CARGO_TARGET_SUBDIR}/edged ${D}${bindir}/edged
    ln -sf edged ${D}${bindir}/edgectl
    install -m 0644 ${EXTERNALSRC}/config/agent.toml ${D}${sysconfdir}/edged/agent.toml
    # edged is the init.
    install -d ${D}${base_sbindir}
    ln -sf ${bindir}/edged ${D}${base_sbindir}/init
}

FILES:${PN} += "${base_sbindir}/init"
RDEPENDS:${PN} = "e2fsprogs-mke2fs e2fsprogs-e2fsck ca-certificates"
RCONFLICTS:${PN} = "sysvinit systemd"
