# shellcheck shell=bash disable=SC2154
# The part of the root file system that comes from Debian: packages and the kernel, without what no node needs.
# A tar archive, the same for all Kubernetes versions.

# Never wanted: sources of package lists and packages, other languages, what only a package manager needs.
base_unwanted=(
	etc/apt etc/cron.daily etc/dpkg etc/logrotate.d etc/systemd/system/multi-user.target.wants usr/lib/apt usr/lib/dpkg
	usr/lib/locale usr/lib/systemd/catalog usr/lib/systemd/system-generators usr/lib/systemd/user
	usr/lib/systemd/user-generators usr/lib/systemd/system-environment-generators usr/lib/udev usr/lib/x86_64-linux-gnu/gconv
	usr/lib/x86_64-linux-gnu/perl usr/lib/x86_64-linux-gnu/perl-base usr/bin/perl usr/share/bash-completion usr/share/bug usr/share/doc usr/share/doc-base
	usr/share/dpkg usr/share/info usr/share/lintian usr/share/locale usr/share/man usr/share/menu usr/share/perl
	usr/share/perl5 usr/share/perl-base usr/share/pixmaps usr/share/zoneinfo usr/share/zsh var/cache var/lib/apt
	var/lib/dpkg var/log/apt
)

# Drivers and file systems of machines that are no VMs.
base_unwanted_modules=(
	drivers/ata drivers/comedi drivers/edac drivers/gpu drivers/hid drivers/hwmon drivers/infiniband drivers/input/mouse
	drivers/input/rmi4 drivers/isdn drivers/media drivers/mtd drivers/nvdimm drivers/parport drivers/pcmcia drivers/platform
	drivers/power drivers/staging drivers/target drivers/thermal drivers/usb drivers/video drivers/xen fs/9p fs/adfs fs/affs
	fs/befs fs/bfs fs/btrfs fs/ceph fs/coda fs/cramfs fs/dlm fs/ecryptfs fs/efs fs/f2fs fs/freevxfs fs/gfs2 fs/hfs
	fs/hfsplus fs/hpfs fs/jffs2 fs/jfs fs/minix fs/nilfs2 fs/ntfs fs/ntfs3 fs/ocfs2 fs/omfs fs/orangefs fs/qnx4 fs/qnx6
	fs/quota fs/reiserfs fs/romfs fs/smb fs/sysv fs/ubifs fs/udf fs/ufs fs/zonefs net/atm net/batman-adv net/bluetooth net/can
	net/ceph net/dccp net/rds net/tipc net/wireless sound
)

base_packages() {
	sed 's/#.*//' "$here/packages.list" | xargs
}

base_archive() {
	local archive
	archive=$cache/node-image/base-$({
		content "$here/packages.list" "$here/lib/base.bash"
		printf '%s\n' "$suite"
	} | key).tar
	cached "$archive" base_build
	printf '%s\n' "$archive"
}

# base_build TAR
base_build() {
	local root=$scratch/base packages
	packages=$(base_packages)
	mmdebstrap --quiet --mode=root --variant=essential --format=directory \
		--aptopt='APT::Install-Recommends "false"' \
		--dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
		--include="${packages// /,}" \
		--skip=cleanup/apt \
		"$suite" "$root" \
		"deb $mirror $suite main" "deb $mirror $suite-updates main" \
		"deb ${mirror%/debian}/debian-security $suite-security main" >&2
	base_kernel "$root"
	base_trim "$root"
	tar -C "$root" --sort=name --numeric-owner --xattrs -cf "$1" .
	rm -rf "$root"
}

# base_kernel ROOT: the kernel's files alone; installing the package would bring tools for an initrd that is not used.
base_kernel() {
	local root=$1 package release
	package=$(apt_in "$root" apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ { print $2; exit }')
	mkdir -p "$scratch/kernel/deb"
	(cd "$scratch/kernel/deb" && apt_in "$root" apt-get download "$package" >&2)
	dpkg-deb --extract "$scratch"/kernel/deb/*.deb "$scratch/kernel/files"
	release=$(basename "$scratch"/kernel/files/lib/modules/*)
	mkdir -p "$root/usr/lib/modules" "$root/boot"
	mv "$scratch/kernel/files/lib/modules/$release" "$root/usr/lib/modules/"
	mv "$scratch/kernel/files/boot/vmlinuz-$release" "$root/boot/vmlinuz"
	(cd "$root/usr/lib/modules/$release/kernel" && rm -rf "${base_unwanted_modules[@]}")
	# A leftover symbol of a removed driver is no reason to stop; what is needed is asked for by name later.
	depmod --basedir "$root/usr" "$release"
	rm -rf "$scratch/kernel"
}

# apt_in ROOT COMMAND…: the host's apt with ROOT's sources, lists and keys.
apt_in() {
	local root=$1
	shift
	"$1" -o Dir="$root" -o Dir::State::status="$root/var/lib/dpkg/status" -o APT::Sandbox::User=root \
		-o Dir::Etc::trustedparts=/etc/apt/trusted.gpg.d/ "${@:2}"
}

# base_trim ROOT
base_trim() {
	local root=$1 plugin
	mkdir -p "$root/opt/cni/bin"
	for plugin in bridge host-local loopback portmap; do
		mv "$root/usr/lib/cni/$plugin" "$root/opt/cni/bin/"
	done
	rm -rf "$root/usr/lib/cni"
	(cd "$root" && rm -rf "${base_unwanted[@]}")
	# journald, and what PID 1 itself needs, is all of systemd that runs here.
	find "$root/etc/systemd/system" -mindepth 1 -delete
	rm -f "$root"/usr/lib/x86_64-linux-gnu/libperl.so* "$root"/usr/bin/perl5* "$root"/usr/bin/networkctl \
		"$root"/usr/lib/systemd/systemd-{networkd,resolved,logind,homed,timesyncd,machined}*
	rm -f "$root"/etc/machine-id "$root"/etc/resolv.conf "$root"/etc/hostname "$root"/initrd.img* "$root"/vmlinuz*
	# Empty, not missing: a missing one makes systemd think of a first boot and enable everything.
	: >"$root/etc/machine-id"
}
